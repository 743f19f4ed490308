"""Block-sparse int8 layers: only blocks of R output rows × 4 input channels that hold a non-zero are multiplied.

The weight is stored as block compressed sparse rows: for each group of R rows, the quads that its blocks stand at
(``index[indptr[g]:indptr[g + 1]]``) and the blocks themselves. A block spans 4 input channels, so that its products
are the dot4 of the instruction set and no activation is moved.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import (
    Accumulators,
    Blocking,
    Pass,
    accumulate,
    loop_nest,
    named,
    parameter,
    tile_offset,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, splat, view


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best; ``rows`` divides ``block_rows``."""
    rows = min(spec.block_rows, 8 if isa.lanes == 16 else 4)
    if isa.lanes == 16:
        return Blocking(rows=rows, tiles={1: 8, 2: 6, 4: 4, 8: 3}[rows], chains=12, chunk=64)
    return Blocking(rows=rows, tiles={1: 4, 2: 2, 4: 1}[rows], chains=8, chunk=64)


def pack(weight: np.ndarray, spec: DenseSpec, knobs: Blocking) -> list[np.ndarray]:
    """``(N, K)`` to indptr int32 ``(groups + 1,)``, index ``(blocks,)`` and blocks s8 ``(blocks, block_rows, 4)``.

    There is always at least one block, so that no array is empty.
    """
    n, k = weight.shape
    rows = spec.block_rows
    padded = np.zeros((math.ceil(n / rows) * rows, k), np.int8)
    padded[:n] = weight
    blocks = padded.reshape(-1, rows, k // QUAD, QUAD).transpose(0, 2, 1, 3)
    group, index = np.nonzero(blocks.any(axis=(2, 3)))
    indptr = np.searchsorted(group, np.arange(len(blocks) + 1)).astype(np.int32)
    values = blocks[group, index]
    if not len(index):
        index, values = np.zeros(1, np.int64), np.zeros((1, rows, QUAD), np.int8)
    return [indptr, index.astype(_index_dtype(k)), np.ascontiguousarray(values)]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, quads, block_rows, rows = spec.out_features, spec.in_features // QUAD, spec.block_rows, knobs.rows
    if block_rows % rows:
        raise ValueError(f"knobs.rows is {rows}; expected a divisor of block_rows, {block_rows}")
    group = math.lcm(block_rows, 1 if spec.output == "tiles" else QUAD)
    passes = block_rows // rows
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"sparse_i8_{block_rows}x4_{n}x{spec.in_features}")
        tiles, stored = T.int64(), T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        indptr = parameter("indptr", (math.ceil(n / block_rows) + 1,), "int32")
        index = parameter("index", (stored,), _index_dtype(spec.in_features))
        weight = parameter("weight", (stored, block_rows, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(quads, tiles),), "int32"))
            words = named("weight_words", view(weight, (stored, block_rows), "int32"))

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                base = named("base", T.Bind(tile_offset(quads, work.first_tile)))
                block, part = divmod(work.index, passes)
                row_group = work.group * (group // block_rows) + block
                begin = named("block_begin", T.Bind(indptr[row_group]))
                end = named("block_end", T.Bind(indptr[row_group + 1]))

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    columns = range(work.tiles * isa.parts)
                    at = named("block", T.Bind(T.cast(begin + j, "int64")))
                    quad = named("quad", T.Bind(T.cast(index[at], "int64")))
                    xs = [T.Bind(vector_at(flat, base + quad * TILE, c, quads * TILE, isa)) for c in columns]
                    for row in range(count):
                        w = T.Bind(splat(words[at, part * rows + row], isa.lanes))
                        for c in columns:
                            register = registers[row][c]
                            T.buffer_store(register, isa.dot4(register[0], xs[c], w), [0])

                accumulate(isa, knobs, work, accumulators, end - begin, step, "int32")

            loop_nest(isa, knobs, tiles, n, group, "int32", reduce, epilogue.emit)
    return builder.get()


def _index_dtype(in_features: int) -> str:
    return "uint16" if in_features // QUAD <= 1 << 16 else "int32"
