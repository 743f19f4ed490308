"""Loads and runs compiled modules with numpy, tvm_ffi, tokenizers and libtvm_runtime alone."""

from __future__ import annotations

import os

from whet.runtime.artifact import open_artifact
from whet.runtime.audit import Auditor
from whet.runtime.engine import Engine
from whet.runtime.metadata import ArtifactError
from whet.runtime.session import Session

__all__ = ["ArtifactError", "Session", "load"]


def load(
    path: str | os.PathLike[str], threads: int | None = None, *, isa: str | None = None, audit: float | None = None
) -> Session:
    """Load a compiled module.

    A module is native code and runs with your rights: load only files that you trust.

    Args:
        path: a file that ``whet.compile`` wrote.
        threads: threads that a call uses; None for every CPU that this process may use (affinity and CPU quota).
        isa: name of one of the instruction sets that the module has code for; None for the fastest that this CPU runs.
        audit: share of requests that a background thread answers again with all layers, to tighten the caches of a
            module that has some when they err too often; it keeps what it saw in ``PATH.audit``. None: no audits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module has no code for ``isa``, or no caches to audit.
        ArtifactError: it is truncated, corrupt, no Whet module, of another format version, or for another CPU.

    """
    artifact = open_artifact(path)
    session = Session(artifact, threads, isa)
    if audit is not None:
        # A second mapping of the file, whose thresholds are its own; all other pages are shared.
        twin = Engine(open_artifact(path), 1, session.metadata.isa)
        kept = artifact.path.with_name(artifact.path.name + ".audit")
        session.auditor = Auditor(session, twin, audit, kept, artifact.digest)
    return session
