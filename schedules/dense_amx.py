"""Dense int8 layers on AMX: 16 output rows × 16 tokens × up to 64 channels in one instruction.

Quads are AMX's second operand as they lie in memory: a tile register row is one quad of 16 tokens. The first operand
is a piece of 16 weight rows. (Intel, Architecture Instruction Set Extensions, chapter on AMX.) The operating system
must have granted the process the tile registers (Linux: ``arch_prctl(ARCH_REQ_XCOMP_PERM, 18)``) before a kernel runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import Block, Blocking, named, parameter
from whet.schedules.isa import TILE, Isa

ROWS = 16
"""Rows of a tile register, and output rows of one."""


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether this family computes the layer, and fast: the quads must split into full enough tile registers."""
    return isa.name == "amx_int8" and spec.weight == "i8" and _depth(spec) >= ROWS // 2


def steps(spec: DenseSpec) -> int:
    """Tile registers that the input channels fill."""
    return spec.in_features // QUAD // _depth(spec)


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Two by two accumulator tiles: each operand loaded is used twice, which the load ports just keep up with."""
    return Blocking(rows=2 * ROWS, tiles=2, chains=1, chunk=96)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(passes, K / 4 / depth, rows / 16, 16, depth, 4)``: tile registers in the order of their use."""
    rows, depth = knobs.rows, _depth(spec)
    padded = np.zeros((math.ceil(spec.out_features / rows) * rows, spec.in_features), np.int8)
    padded[: spec.out_features] = weight
    split = padded.reshape(-1, rows // ROWS, ROWS, steps(spec), depth, QUAD)
    return [np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4, 5))]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``.

    Weights are the outer loop, so that they are read once however many tokens there are.
    """
    n, quads, rows, most = spec.out_features, spec.in_features // QUAD, knobs.rows, knobs.tiles
    depth = _depth(spec)
    row_tiles = rows // ROWS
    if rows % ROWS or row_tiles * most + row_tiles + most > 8:
        raise ValueError(f"knobs are {rows} rows × {most} tiles; AMX has 8 tile registers of 16 rows")
    passes = math.ceil(n / rows)
    per_task = max(1, round(knobs.chunk / rows))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"dense_amx_{n}x{spec.in_features}")
        tiles = T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        weight = parameter("weight", (passes, steps(spec), row_tiles, ROWS, depth, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        registers = _Registers(row_tiles, most)

        def multiply(index: Any, first: Any, count: int, sums: Any) -> None:
            for r in range(row_tiles):
                for t in range(count):
                    _amx("tilezero", registers.sum(r, t))
            with T.serial(steps(spec)) as k:
                for t in range(count):
                    _load(registers.token(t), T.address_of(x[first + t, k * depth, 0, 0]), TILE * QUAD)
                for r in range(row_tiles):
                    _load(registers.row(r), T.address_of(weight[index, k, r, 0, 0, 0]), depth * QUAD)
                    for t in range(count):
                        _amx("tdpbsud", registers.sum(r, t), registers.row(r), registers.token(t))
            for r in range(row_tiles):
                for t in range(count):
                    # access_ptr, because TVM shrinks a buffer to what it sees loaded unless its pointer escapes.
                    at = sums.access_ptr("w", offset=(t * rows + r * ROWS) * TILE)
                    _amx("tilestored64", registers.sum(r, t), at, T.int64(TILE * 4))

        with T.sblock("root"):
            T.reads()
            T.writes()
            blocks = named("blocks", T.Bind((tiles + (most - 1)) // most))
            with T.parallel(math.ceil(passes / per_task)) as task:
                sums = named("sums", T.alloc_buffer((most, rows, TILE), "int32"))
                configuration = T.alloc_buffer((8,), "int64")
                for i, word in enumerate(_configuration(registers, depth)):
                    T.buffer_store(configuration, T.int64(int(word)), [i])
                _amx("ldtilecfg", T.address_of(configuration[0]))
                with T.serial(T.min(per_task, passes - task * per_task)) as i, T.serial(blocks) as b:
                    index = named("pass", T.Bind(task * per_task + i))
                    first = named("first_tile", T.Bind(b * tiles // blocks))
                    count = named("tile_count", T.Bind(T.cast((b + 1) * tiles // blocks - first, "int32")))
                    for size in range(1, most + 1):
                        with T.If(count == size), T.Then():
                            multiply(index, first, size, sums)
                    first_row = index * rows
                    epilogue.emit(Block(first_row, T.min(rows, n - first_row), first, count, sums))
                _amx("tilerelease")
    return builder.get()


class _Registers:
    """Which tile register holds what."""

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens

    def sum(self, row: int, token: int) -> Any:
        return T.int8(row * self.tokens + token)

    def row(self, row: int) -> Any:
        return T.int8(self.rows * self.tokens + row)

    def token(self, token: int) -> Any:
        return T.int8(self.rows * self.tokens + self.rows + token)


def _configuration(registers: _Registers, depth: int) -> NDArray[Any]:
    """Build the 64 bytes of LDTILECFG as 8 words: palette 1, then bytes per row and rows of each tile register."""
    sums, rows, tokens = registers.rows * registers.tokens, registers.rows, registers.tokens
    data = np.zeros(64, np.uint8)
    data[0] = 1
    data[16:32].view(np.uint16)[: sums + rows + tokens] = [64] * sums + [depth * QUAD] * rows + [64] * tokens
    data[48 : 48 + sums + rows + tokens] = [ROWS] * (sums + rows) + [depth] * tokens
    return data.view(np.int64)


def _depth(spec: DenseSpec) -> int:
    """Quads in a tile register: the most that divide the layer's, so that none is left over."""
    return max(d for d in range(1, ROWS + 1) if spec.in_features // QUAD % d == 0)


def _load(register: Any, address: Any, stride: int) -> None:
    _amx("tileloadd64", register, address, T.int64(stride))


def _amx(name: str, *args: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))
