"""Block-sparse int8 layers: only blocks of R output rows × 4 input channels that hold a non-zero are multiplied, R ≥ 4.

The weight is stored as block compressed sparse rows: for each group of R rows, the quads that its blocks stand at
(``index[indptr[g]:indptr[g + 1]]``) and the blocks themselves. A block spans 4 input channels, so that its products
are the dot4 of the instruction set and no activation is moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import (
    PREFETCH_BYTES,
    Accumulators,
    Blocking,
    Order,
    Pass,
    accumulate,
    chunk_count,
    group_rows,
    loop_nest,
    multiply_add,
    named,
    parameter,
    tile_offset,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, prefetch, splat, view

FAR_BYTES = 96 << 10
"""Activations of a tile block from which on they are prefetched: they are far larger than the first-level cache."""

STEPS_AHEAD = 8
"""How far ahead of their use they are prefetched."""

PADDING = 2
"""What a row group's blocks are a multiple of, so that the reduction splits into chains without a rest."""


@dataclass(frozen=True)
class SparseBlocking(Blocking):
    """Blocking, and how the reduction reads: blocks in order, activations wherever the blocks stand."""

    ahead: int = PREFETCH_BYTES
    """How many bytes ahead of their use blocks are prefetched."""
    reach: int = 0
    """How many blocks ahead of their use activations are prefetched, where there are several tiles; 0: never."""
    unroll: int = 1
    """Blocks of an iteration, where the reduction is not split into chains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 0 or self.reach < 0:
            raise ValueError(f"ahead is {self.ahead}, reach is {self.reach}; expected at least 0")
        if self.unroll < 1 or PADDING % self.unroll:
            raise ValueError(f"unroll is {self.unroll}; expected a divisor of {PADDING}")


def default_knobs(spec: DenseSpec, isa: Isa) -> SparseBlocking:
    """Return the register blocking that measured best; ``rows`` divides ``block_rows``."""
    rows = min(spec.block_rows, 8 if isa.lanes == 16 else 4)
    tiles, chains = ({4: 4, 8: 3}[rows], 16) if isa.lanes == 16 else (1, 8)
    reach = STEPS_AHEAD if tiles * spec.in_features * TILE > FAR_BYTES else 0
    return SparseBlocking(rows=rows, tiles=tiles, chains=chains, chunk=64, reach=reach)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: SparseBlocking) -> list[NDArray[Any]]:
    """``(N, K)`` to five arrays: bounds, order, indptr, index, blocks.

    Whole groups are computed in ascending order of their number of blocks: the branch at the end of a reduction is
    mispredicted only where that number changes. ``order`` int32 says which group stands at each position; chunk c
    computes positions ``bounds[c]`` to ``bounds[c + 1]`` (int32), about the same number of blocks each. Blocks of row
    group r, counted in that order, are ``indptr[r]`` to ``indptr[r + 1]`` (int32), a multiple of ``PADDING``, the last
    perhaps zeros; ``index`` (uint16, or int32 for very wide layers) is the quad, ``blocks`` s8 ``(…, block_rows, 4)``.
    ``index`` is longer than ``blocks`` by what the kernel reads ahead.
    """
    n, k = weight.shape
    rows = spec.block_rows
    padded = np.zeros((math.ceil(n / rows) * rows, k), np.int8)
    padded[:n] = weight
    blocks = padded.reshape(-1, rows, k // QUAD, QUAD).transpose(0, 2, 1, 3)
    present: NDArray[Any] = np.asarray(blocks.any(axis=(2, 3)))

    bounds, order, positions, indptr = by_length(present.sum(1), n, rows, knobs)
    stored = max(int(indptr[-1]), 1)  # no array is empty, not even for a weight of zeros
    index, values = np.zeros(stored + knobs.reach, _index_dtype(k)), np.zeros((stored, rows, QUAD), np.int8)
    group_of, quad = np.nonzero(present[positions])
    at = indptr[group_of] + np.arange(len(quad)) - np.searchsorted(group_of, group_of)
    index[at], values[at] = quad, blocks[positions[group_of], quad]
    return [bounds, order, indptr.astype(np.int32), index, values]


def by_length(counts: NDArray[Any], n: int, rows: int, knobs: Blocking) -> tuple[NDArray[Any], ...]:
    """Order groups by their number of blocks: bounds and order as in ``pack``, positions, indptr.

    ``counts`` are the blocks of each ``rows`` of the ``n`` rows, which ``positions`` permutes to the order of
    computation.
    """
    group = group_rows(n, rows)
    whole, per_group = n // group, group // rows
    counts = counts + -counts % PADDING
    work = counts[: whole * per_group].reshape(whole, per_group).sum(1)
    order = np.argsort(work, kind="stable")
    bounds = _balanced(work[order], chunk_count(knobs, n))
    positions = np.concatenate(
        [(order[:, None] * per_group + np.arange(per_group)).reshape(-1), np.arange(whole * per_group, len(counts))]
    )
    indptr = np.concatenate([[0], np.cumsum(counts[positions])])
    return bounds, order.astype(np.int32) if whole else np.zeros(1, np.int32), positions, indptr


def _balanced(work: NDArray[Any], chunks: int) -> NDArray[Any]:
    """Positions that cut ``work`` into chunks of about the same sum; a group costs a little even without blocks."""
    total = np.concatenate([[0], np.cumsum(work + 2)])
    return np.searchsorted(total, np.linspace(0, total[-1], chunks + 1)).astype(np.int32)


def kernel(spec: DenseSpec, isa: Isa, knobs: SparseBlocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, quads, block_rows, rows = spec.out_features, spec.in_features // QUAD, spec.block_rows, knobs.rows
    if block_rows % rows:
        raise ValueError(f"knobs.rows is {rows}; expected a divisor of block_rows, {block_rows}")
    group = group_rows(spec.out_features, spec.block_rows)
    chunks = chunk_count(knobs, n)
    passes = block_rows // rows
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"sparse_i8_{block_rows}x4_{n}x{spec.in_features}")
        tiles, stored, indices = T.int64(), T.int64(), T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        bounds = parameter("bounds", (chunks + 1,), "int32")
        order = parameter("order", (max(n // group, 1),), "int32")
        indptr = parameter("indptr", (math.ceil(n / block_rows) + 1,), "int32")
        index = parameter("index", (indices,), _index_dtype(spec.in_features))
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
                row_group = work.position * (group // block_rows) + block
                begin = named("block_begin", T.Bind(indptr[row_group]))
                end = named("block_end", T.Bind(indptr[row_group + 1]))

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    at = named("block", T.Bind(T.cast(begin + j, "int64")))
                    quad = named("quad", T.Bind(T.cast(index[at], "int64")))
                    multiply_add(
                        registers,
                        count,
                        lambda column: vector_at(flat, base + quad * TILE, column, quads * TILE, isa),
                        lambda row: splat(words[at, part * rows + row], isa.lanes),
                        isa.dot4,
                    )

                split = 2 * work.rows * work.tiles * isa.parts <= knobs.chains
                together = 1 if split else knobs.unroll

                def steps(j: Any, count: int, registers: Accumulators) -> None:
                    for i in range(together):
                        step(j * together + i, count, registers)

                def ahead(j: Any) -> None:
                    at = T.cast(begin + j * together, "int64")
                    prefetch(words, at + knobs.ahead // (block_rows * QUAD), 0)
                    if knobs.reach and work.tiles > 1:
                        for i in range(together):
                            quad = T.Bind(T.cast(index[at + (i + knobs.reach)], "int64"))
                            for tile in range(work.tiles):
                                prefetch(flat, base + quad * TILE + tile * (quads * TILE))

                length = T.truncdiv(end - begin, together)
                accumulate(isa, knobs, work, accumulators, length, steps, ahead, "int32", PADDING // together)

            by_length = Order(bound=lambda c: bounds[c], group=lambda position: order[position])
            loop_nest(isa, knobs, tiles, n, "int32", reduce, epilogue.emit, by_length, block_rows)

    return builder.get()


def _index_dtype(in_features: int) -> str:
    return "uint16" if in_features // QUAD <= 1 << 16 else "int32"
