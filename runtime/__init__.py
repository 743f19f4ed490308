"""Loads and runs compiled modules with numpy, tvm_ffi, tokenizers and libtvm_runtime alone."""

from __future__ import annotations

import os

from whet.runtime.artifact import open_artifact
from whet.runtime.audit import Auditor
from whet.runtime.engine import Engine
from whet.runtime.memo_file import MemoError
from whet.runtime.metadata import ArtifactError
from whet.runtime.session import Session

__all__ = ["ArtifactError", "MemoError", "Session", "load"]


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    isa: str | None = None,
    audit: float | None = None,
    memo: str | os.PathLike[str] | None = None,
    memo_level: str = "default",
    memo_grow: bool = False,
) -> Session:
    """Load a compiled module.

    A module is native code and runs with your rights: load only files that you trust.

    Args:
        path: a file that ``whet.compile`` wrote.
        threads: threads that a call uses; None for every CPU that this process may use (affinity and CPU quota).
        isa: name of one of the instruction sets that the module has code for; None for the fastest that this CPU runs.
        audit: share of requests that a background thread answers again with all layers, to tighten the caches of a
            module that has some when they err too often; it keeps what it saw in ``PATH.audit``. None: no audits.
        memo: file that ``whet memo build`` made for this module: requests near enough to one of its records use that.
        memo_level: how near is near enough: ``"strict"``, ``"default"`` or ``"loose"``.
        memo_grow: let requests that find nothing add records while there is room; one process at a time may.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module has no code for ``isa``, or no caches to audit; there is no such level.
        MemoError: the memo file is damaged, or for another module.
        ArtifactError: it is truncated, corrupt, no Whet module, of another format version, or for another CPU.

    """
    artifact = open_artifact(path)
    session = Session(artifact, threads, isa)
    if audit is not None:
        # A second mapping of the file, whose thresholds are its own; all other pages are shared.
        twin = Engine(open_artifact(path), 1, session.metadata.isa)
        kept = artifact.path.with_name(artifact.path.name + ".audit")
        session.auditor = Auditor(session, twin, audit, kept, artifact.digest)
    if memo is not None:
        session.memo = session.open_memo(memo, level=memo_level, grow=memo_grow)
    return session
