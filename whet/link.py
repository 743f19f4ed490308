"""Links compiled code with its weights, tokenizer and metadata into one shared object.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from whet.runtime.artifact import code_digest, find_sections
from whet.runtime.metadata import ALIGNMENT, Metadata, Weight, to_json

_PAGE = 4096

_CODE_ROOM = 16 << 20
"""Bytes that object files and code are sure to fit in, twice."""

# Only what TVM's loader and C programs look up stays visible.
_EXPORTS = "{ global: whet_*; __tvm_ffi_*; __TVM*; local: *; };\n"


class Executable(Protocol):
    """The part of ``tvm.relax.VMExecutable`` that linking needs."""

    def export_library(self, file_name: str, *, fcompile: Callable[..., None], workspace_dir: str) -> object:
        """Write object files to ``workspace_dir`` and call ``fcompile(file_name, object_files)``."""


class Blob:
    """Weights one after the other. Arrays with the same bytes stand once, such as those that variants share."""

    def __init__(self) -> None:
        self.size = 0
        self._arrays: list[tuple[int, NDArray[np.generic]]] = []
        self._offsets: dict[bytes, int] = {}

    def add(self, name: str, array: NDArray[np.generic]) -> Weight:
        """Give an array its place."""
        contiguous = np.ascontiguousarray(array)
        digest = hashlib.sha256(contiguous.data.cast("B") if array.size else b"").digest()
        if digest not in self._offsets:
            offset = self._offsets[digest] = self.size + -self.size % ALIGNMENT
            self._arrays.append((offset, contiguous))
            self.size = offset + array.nbytes
        return Weight(name, array.dtype.name, array.shape, self._offsets[digest])

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All bytes, padding included, one piece after the other."""
        end = 0
        for offset, array in self._arrays:
            yield bytes(offset - end)
            yield array.data.cast("B") if array.size else b""
            end = offset + array.nbytes
        yield bytes(-end % ALIGNMENT)


def write_module(
    variants: Sequence[tuple[Executable, Metadata]],
    weights: Blob,
    tokenizer_json: str | None,
    output: str | os.PathLike[str],
) -> None:
    """Write ``output``, a shared object that :func:`whet.runtime.load` opens.

    Args:
        variants: per instruction set, the fastest first: a built TVM executable with the function that the metadata
            describe, whose weights are in ``weights``. The convention ``"padded"`` allows one only.
        weights: what becomes the section of the weights.
        tokenizer_json: contents of ``tokenizer.json``; None for a module that takes token ids only.
        output: replaced atomically; on any error or interrupt an older file of this name stays as it was.

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
        with (workspace / "weights").open("wb") as file:
            file.writelines(weights.pieces())
        (workspace / "metadata").write_text(to_json([m for _, m in variants]), encoding="utf-8")
        (workspace / "tokenizer").write_text(tokenizer_json or "", encoding="utf-8")
        (workspace / "exports").write_text(_EXPORTS, encoding="ascii")
        (workspace / "sections.s").write_text(_assembly(), encoding="ascii")
        _check_room(workspace / "reserve", (workspace / "weights").stat().st_size + _CODE_ROOM)
        objects: list[str] = []
        # Of the C helpers that every variant brings, linkers take the first: every CPU must be able to run it.
        for i, (executable, _) in reversed([*enumerate(variants)]):
            (workspace / str(i)).mkdir()
            executable.export_library(
                str(workspace / "module.so"),
                fcompile=lambda _, files, **__: objects.extend(files),
                workspace_dir=str(workspace / str(i)),
            )
        _link(compiler, workspace, workspace / "module.so", objects)
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
