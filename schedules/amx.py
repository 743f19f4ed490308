"""AMX: the instructions on tile registers as statements of a kernel.

There are eight registers of up to 16 rows × 64 bytes. ``tdpbsud`` and its sisters add, to 16 × 16 sums of int32, the
products of a first operand (rows of bytes) and a second (rows of 16 quads); ``tdpbf16ps``, to sums of float32, those of
rows of bfloat16 and rows of 16 pairs: Intel, Architecture Instruction Set Extensions, chapter on AMX. The operating
system must have granted the process the registers (Linux: ``arch_prctl(ARCH_REQ_XCOMP_PERM, 18)``) before a kernel
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T

ROWS = 16
"""Most rows of a tile register."""
ROW_BYTES = 64
"""Most bytes of a row."""
REGISTERS = 8
"""Tile registers."""


def configuration(shapes: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Build LDTILECFG's 64 bytes, as 16 words, from the rows and bytes per row of each register, at most 8 of them."""
    data = np.zeros(64, np.uint8)
    data[0] = 1  # palette
    data[16:32].view(np.uint16)[: len(shapes)] = [row_bytes for _, row_bytes in shapes]
    data[48 : 48 + len(shapes)] = [rows for rows, _ in shapes]
    return data.view(np.int32)


def configure(shapes: Sequence[tuple[int, int]]) -> None:
    """Emit LDTILECFG for ``configuration(shapes)``: once in each thread, before it uses the registers."""
    # One vector, as what takes over this buffer's memory later is one: TVM refuses memory that is of two types.
    words = T.alloc_buffer((1,), "int32x16")
    values = [T.int32(int(word)) for word in configuration(shapes)]
    T.buffer_store(words, tirx.Shuffle(values, [T.int32(i) for i in range(len(values))]), [0])
    call("ldtilecfg", T.address_of(words[0]))


def release() -> None:
    """Emit TILERELEASE: the last thing a thread does with the registers."""
    call("tilerelease")


def load(register: int, address: Any, stride: int, *, stream: bool = False) -> None:
    """Emit a load of a register whose rows are ``stride`` bytes apart in memory.

    ``stream`` leaves the first-level cache to others: for what is too large to be found there again.
    """
    call("tileloaddt164" if stream else "tileloadd64", T.int8(register), address, T.int64(stride))


def store(register: int, address: Any, stride: int) -> None:
    """Emit a store of a register.

    Take the address by ``access_ptr``: TVM shrinks a buffer to what it sees loaded, unless its pointer escapes.
    """
    call("tilestored64", T.int8(register), address, T.int64(stride))


def zero(register: int) -> None:
    """Emit the clearing of a register."""
    call("tilezero", T.int8(register))


def multiply_add(name: str, sums: int, first: int, second: int) -> None:
    """Emit tdpbf16ps, or one of tdpbssd, tdpbsud, tdpbusd and tdpbuud: two letters for the signs of the bytes."""
    call(name, T.int8(sums), T.int8(first), T.int8(second))


def call(name: str, *args: Any) -> None:
    """Emit the intrinsic ``llvm.x86.name``, which returns nothing."""
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))
