"""Links a compiled executable with its weights, tokenizer and metadata into one shared object.

The format is described in :mod:`whet.runtime.artifact`. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from whet.runtime.artifact import code_digest, find_sections
from whet.runtime.metadata import ALIGNMENT, Metadata, Weight, lay_out

_PAGE = 4096

_CODE_ROOM = 16 << 20
"""Bytes that object files and code are sure to fit in, twice."""

# Only what TVM's loader and C programs look up stays visible.
_EXPORTS = "{ global: whet_*; __tvm_ffi_*; __TVM*; local: *; };\n"


class Executable(Protocol):
    """The part of ``tvm.relax.VMExecutable`` that linking needs."""

    def export_library(self, file_name: str, *, fcompile: Callable[..., None], workspace_dir: str) -> object:
        """Write object files to ``workspace_dir`` and call ``fcompile(file_name, object_files)``."""


def write_module(
    executable: Executable,
    metadata: Metadata,
    weights: Mapping[str, NDArray[np.generic]],
    tokenizer_json: str | None,
    output: str | os.PathLike[str],
) -> Metadata:
    """Write ``output``, a shared object that :func:`whet.runtime.load` opens.

    Args:
        executable: a built TVM executable with the ``main`` that ``metadata.convention`` describes.
        metadata: its ``weights`` table is replaced by the one of ``weights``.
        weights: arrays in the order in which they stand in the blob.
        tokenizer_json: contents of ``tokenizer.json``; None for a module that takes token ids only.
        output: replaced atomically; on any error or interrupt an older file of this name stays as it was.

    Returns:
        The metadata as written.

    Raises:
        FileNotFoundError: no C compiler, or no such output folder.
        OSError: the disk is full (``ENOSPC``).
        RuntimeError: the linker fails.

    """
    output = Path(output).absolute()  # the linker runs in another folder
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or name another output")
    if output.is_dir():
        raise IsADirectoryError(
            f"{output} is a folder; expected the name of a file to write, such as {output}/model.so"
        )
    compiler = find_compiler()
    # In the output's folder, so that the last step is a rename within one file system.
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        table = _write_weights(workspace / "weights", weights)
        metadata = replace(metadata, weights=table)
        (workspace / "metadata").write_text(metadata.to_json(), encoding="utf-8")
        (workspace / "tokenizer").write_text(tokenizer_json or "", encoding="utf-8")
        (workspace / "exports").write_text(_EXPORTS, encoding="ascii")
        (workspace / "sections.s").write_text(_assembly(), encoding="ascii")
        _check_room(workspace / "reserve", (workspace / "weights").stat().st_size + _CODE_ROOM)
        executable.export_library(
            str(workspace / "module.so"),
            fcompile=lambda target, objects, **_: _link(compiler, workspace, Path(target), objects),
            workspace_dir=str(workspace),
        )
        _seal(workspace / "module.so")
        (workspace / "module.so").replace(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(
                error.errno, f"no room to write {output}: free some space in {output.parent.resolve()}, or name another"
            ) from error
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return metadata


def find_compiler() -> str:
    """Find the C compiler that links modules: the environment variable CC, else cc, gcc or clang.

    Raises:
        FileNotFoundError: there is none.

    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"no C compiler found (looked for {', '.join(names)}), which is needed to link the module: install one "
        "(apt-get install gcc, dnf install gcc, apk add gcc musl-dev), or name one in the environment variable CC"
    )


def _write_weights(path: Path, weights: Mapping[str, NDArray[np.generic]]) -> tuple[Weight, ...]:
    table = []
    offsets = lay_out(array.nbytes for array in weights.values())
    with path.open("wb") as file:
        for offset, (name, array) in zip(offsets, weights.items(), strict=True):
            file.write(bytes(offset - file.tell()))
            table.append(Weight(name, array.dtype.name, array.shape, offset))
            file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        file.write(bytes(-file.tell() % ALIGNMENT))
    return tuple(table)


def _check_room(path: Path, size: int) -> None:
    """Find out whether the disk has room before LLVM does: when a write fails, LLVM ends the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    path.unlink()


def _assembly() -> str:
    lines = ['.section .note.GNU-stack,"",@progbits']
    for name in ("metadata", "weights", "tokenizer"):
        lines += [
            f'.section .whet.{name},"a",@progbits',
            f".balign {_PAGE if name == 'weights' else 8}",
            f".globl whet_{name}, whet_{name}_size",
            f"whet_{name}:",
            f'.incbin "{name}"',
            f".Lend_{name}: .byte 0",
            '.section .rodata,"a",@progbits',
            ".balign 8",
            f"whet_{name}_size: .quad .Lend_{name} - whet_{name}",
        ]
    lines += ['.section .whet.digest,"a",@progbits', ".globl whet_digest", "whet_digest: .zero 64"]
    return "\n".join(lines) + "\n"


def _link(compiler: str, workspace: Path, target: Path, objects: list[str]) -> None:
    command = [compiler, "-shared", "-fPIC", "-o", str(target), "sections.s", *objects, "-lm"]
    command += ["-Wl,--version-script=exports", "-Wl,--strip-debug", "-Wl,-z,noexecstack"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "File too large" in done.stderr or f"signal {int(signal.SIGXFSZ)}" in done.stderr:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    raise RuntimeError(f"linking failed with status {done.returncode}: {' '.join(command)}\n{done.stderr.strip()}")


def _seal(path: Path) -> None:
    """Fill in the checksums and bring the file to the disk."""
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            sections = find_sections(path, pages)
            weights = sections[".whet.weights"]
            digest = code_digest(pages, sections) + hashlib.sha256(pages[weights.offset : weights.end]).digest()
        file.seek(sections[".whet.digest"].offset)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
