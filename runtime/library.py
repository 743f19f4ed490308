"""Finds and loads TVM's small runtime library (3 MB) without its compiler (259 MB)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from whet.runtime.metadata import ArtifactError

NAME = "libtvm_runtime.so"
VARIABLE = "WHET_TVM_RUNTIME"


@cache
def load_runtime(folder: Path) -> ctypes.CDLL:
    """Load the runtime library into this process, once, and return it.

    Looks at the environment variable ``WHET_TVM_RUNTIME``, in ``folder`` (the module's own), beside this file, and in
    an installed ``apache-tvm``, which is located but not imported. Where ``tvm`` is already imported, its library is
    the one in use.

    Raises:
        ArtifactError: it is not found, or does not load.

    """
    # The pool reads these when it starts. Pinned workers of co-located processes fight for the same cores, and TVM's
    # own 300 000 rounds of spinning (0.1 s) between requests burn the CPU quota of a container.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "10000")
    import tvm_ffi  # noqa: F401, PLC0415 -- loads libtvm_ffi.so, which the runtime library needs

    path = find_runtime(folder)
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"{path} does not load ({error}); it must be the one of apache-tvm 0.27") from error


def find_runtime(folder: Path) -> Path:
    """Path of the runtime library that :func:`load_runtime` loads."""
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise ArtifactError(f"{VARIABLE} is {named!r}, which is no file; expected the path of {NAME}")
        return Path(named)
    candidates = [folder / NAME, Path(__file__).parent / NAME]
    if (spec := importlib.util.find_spec("tvm")) and spec.origin:
        installed = Path(spec.origin).parent / "lib" / NAME
        # Two copies in one process would register TVM's functions twice.
        candidates.insert(0 if "tvm" in sys.modules else len(candidates), installed)
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise ArtifactError(
        f"{NAME} is neither in {' nor in '.join(str(p.parent) for p in candidates)}: copy it there from the folder "
        f"tvm/lib of an installed apache-tvm, name it in {VARIABLE}, or pip install apache-tvm"
    )
