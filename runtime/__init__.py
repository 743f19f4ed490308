"""Loads and runs compiled modules with numpy, tvm_ffi, tokenizers and libtvm_runtime alone."""

from __future__ import annotations

import os

from whet.runtime.artifact import open_artifact
from whet.runtime.metadata import ArtifactError
from whet.runtime.session import Session

__all__ = ["ArtifactError", "Session", "load"]


def load(path: str | os.PathLike[str], threads: int | None = None, *, isa: str | None = None) -> Session:
    """Load a compiled module.

    A module is native code and runs with your rights: load only files that you trust.

    Args:
        path: a file that ``whet.compile`` wrote.
        threads: threads that a call uses; None for every CPU that this process may use (affinity and CPU quota).
        isa: name of one of the instruction sets that the module has code for; None for the fastest that this CPU runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module has no code for ``isa``.
        ArtifactError: it is truncated, corrupt, no Whet module, of another format version, or for another CPU.

    """
    return Session(open_artifact(path), threads, isa)
