"""Finds and loads TVM's small runtime library (3 MB) without its compiler (259 MB)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

from whet.runtime.metadata import ArtifactError

NAME = "libtvm_runtime.so"
VARIABLE = "WHET_TVM_RUNTIME"


def load_runtime(folder: Path) -> ctypes.CDLL:
    """Load the runtime library into this process, if it is not there yet, and return it.

    Raises:
        ArtifactError: it is not found, or does not load.

    """
    from whet.runtime import ffi  # noqa: F401, PLC0415 -- loads libtvm_ffi.so, which the runtime library needs

    path = _loaded() or find_runtime(folder)
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"{path} does not load ({error}); it must be the one of apache-tvm 0.27") from error


def find_runtime(folder: Path) -> Path:
    """Find the runtime library for a module in ``folder``.

    Looks at the environment variable ``WHET_TVM_RUNTIME``, in an installed ``apache-tvm`` (located, not imported), in
    ``folder`` and beside this file. The installed one precedes copies because a second copy in the process, should
    ``tvm`` be imported later, would end it.

    Raises:
        ArtifactError: it is in none of these places.

    """
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise ArtifactError(f"{VARIABLE} is {named!r}, which is no file; expected the path of {NAME}")
        return Path(named)
    candidates = [folder / NAME, Path(__file__).parent / NAME]
    if (spec := importlib.util.find_spec("tvm")) and spec.origin:
        candidates.insert(0, Path(spec.origin).parent / "lib" / NAME)
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise ArtifactError(
        f"{NAME} is neither in {' nor in '.join(str(p.parent) for p in candidates)}: copy it there from the folder "
        f"tvm/lib of an installed apache-tvm, name it in {VARIABLE}, or pip install apache-tvm"
    )


def _loaded() -> Path | None:
    """Find the runtime library that this process has loaded, by us or by ``import tvm``: there must be only one."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.endswith(f"/{NAME}"):
            return Path(line.split(maxsplit=5)[5])
    return None
