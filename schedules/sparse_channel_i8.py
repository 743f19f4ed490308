"""Block-sparse int8 layers whose blocks are 4 output rows × 1 input channel, as in Intel's sparse checkpoints.

Blocks of 4 × 4 would hold most of such a weight. Here each group of four rows multiplies the channels it keeps, four at
a time; the activations of any four channels are brought together on the way. For that a call first copies them so that
a channel's bytes lie together, four of its tokens in one word: two unpacks per vector then make what dot4 wants, and
all four rows use it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
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
    loop_nest,
    multiply_add,
    named,
    parameter,
    tile_blocks,
    tile_offset,
    tiles_of_block,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, prefetch, splat, view
from whet.schedules.sparse_i8 import PADDING, by_length

COLUMNS = 4
"""Vectors of tokens that are copied together: as many words as fit in 128 bits, within which unpacks work."""


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best; ``rows`` is 4 and ``tiles`` at most ``COLUMNS`` vectors."""
    tiles = COLUMNS // isa.parts if isa.dot != "vnni256" else 1  # the copy lies denser, but two tiles fill 16 registers
    return Blocking(rows=QUAD, tiles=tiles, chains=8, chunk=64)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to five arrays: bounds, order, indptr, index, blocks.

    As ``sparse_i8.pack``, but a block is any four input channels: ``index`` uint16 (int32 for very wide layers)
    ``(…, 4)``, ``blocks`` s8 ``(…, 4 rows, 4)``.
    """
    n, k = weight.shape
    padded = np.zeros((math.ceil(n / QUAD) * QUAD, k), np.int8)
    padded[:n] = weight
    groups = padded.reshape(-1, QUAD, k)
    present: NDArray[Any] = np.asarray(groups.any(axis=1))
    counts = np.ceil(present.sum(1) / QUAD).astype(np.int64)
    bounds, order, positions, indptr = by_length(counts, n, QUAD, knobs)
    stored = max(int(indptr[-1]), 1)
    index, values = np.zeros((stored, QUAD), _index_dtype(k)), np.zeros((stored, QUAD, QUAD), np.int8)
    group_of, channel = np.nonzero(present[positions])
    number = np.arange(len(channel)) - np.searchsorted(group_of, group_of)
    at, slot = indptr[group_of] + number // QUAD, number % QUAD
    index[at, slot], values[at, :, slot] = channel, groups[positions[group_of], :, channel]
    return [bounds, order, indptr.astype(np.int32), index, values]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, k, quads = spec.out_features, spec.in_features, spec.in_features // QUAD
    if knobs.rows != QUAD or knobs.tiles * isa.parts > COLUMNS:
        raise ValueError(
            f"knobs are {knobs.rows} rows and {knobs.tiles} tiles; expected 4 and at most {COLUMNS // isa.parts}"
        )
    chunks = chunk_count(knobs, n)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"sparse_i8_4x1_{n}x{k}")
        tiles, stored = T.int64(), T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        bounds = parameter("bounds", (chunks + 1,), "int32")
        order = parameter("order", (max(n // QUAD, 1),), "int32")
        indptr = parameter("indptr", (math.ceil(n / QUAD) + 1,), "int32")
        index = parameter("index", (stored, QUAD), _index_dtype(k))
        weight = parameter("weight", (stored, QUAD, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(quads, tiles),), "int32"))
            words = named("weight_words", view(weight, (stored, QUAD), "int32"))
            blocks = tile_blocks(knobs, tiles)
            channels = named("channels", T.alloc_buffer((blocks, k, isa.lanes), "int32"))
            with T.parallel(blocks) as b:
                first, count = tiles_of_block(b, tiles, blocks)
                for size in range(1, knobs.tiles + 1):
                    with T.If(count == size), T.Then(), T.serial(quads) as quad:
                        at = tile_offset(quads, first) + quad * TILE
                        columns = [vector_at(flat, at, c, quads * TILE, isa) for c in range(size * isa.parts)]
                        for i, channel in enumerate(_apart(columns, isa.lanes)):
                            T.buffer_store(channels, channel, [b, quad * QUAD + i, T.ramp(0, 1, isa.lanes)])

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                begin = named("block_begin", T.Bind(indptr[work.position]))
                end = named("block_end", T.Bind(indptr[work.position + 1]))

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    at = named("block", T.Bind(T.cast(begin + j, "int64")))
                    kept = [
                        T.Bind(channels[work.tile_block, T.cast(index[at, i], "int64"), T.ramp(0, 1, isa.lanes)])
                        for i in range(QUAD)
                    ]
                    columns = _together(kept, work.tiles * isa.parts, isa.lanes)
                    multiply_add(
                        registers,
                        count,
                        lambda column: columns[column],
                        lambda row: splat(words[at, row], isa.lanes),
                        isa.dot4,
                    )

                def ahead(j: Any) -> None:
                    prefetch(words, T.cast(begin + j, "int64") + PREFETCH_BYTES // QUAD**2, 0)

                accumulate(isa, knobs, work, accumulators, end - begin, step, ahead, "int32", PADDING)

            ascending = Order(bound=lambda c: bounds[c], group=lambda position: order[position])
            loop_nest(isa, knobs, tiles, n, "int32", reduce, epilogue.emit, ascending, QUAD)
    return builder.get()


def _apart(columns: list[Any], lanes: int) -> list[Any]:
    """Four channels, from ``COLUMNS`` vectors or fewer of quads: word c of 128 bits is four tokens of vector c."""
    quarters = range(lanes // 4)
    transposed = [16 * q + 4 * token + channel for q in quarters for channel in range(4) for token in range(4)]
    byte = f"uint8x{4 * lanes}"
    vectors = [T.reinterpret(byte, T.Bind(v)) for v in columns]
    vectors = [T.reinterpret(f"int32x{lanes}", T.Bind(tirx.Shuffle([v, v], transposed))) for v in vectors]
    a, b, c, d = [*vectors, *[splat(0, lanes, "int32")] * (COLUMNS - len(vectors))]
    pairs = [(_unpack(a, b, 4, lanes, high), _unpack(c, d, 4, lanes, high)) for high in (0, 1)]
    return [_unpack(ab, cd, 8, lanes, high) for ab, cd in pairs for high in (0, 1)]


def _together(channels: list[Any], columns: int, lanes: int) -> list[Any]:
    """The first ``columns`` vectors of quads that four channels as ``_apart`` makes them are."""
    a, b, c, d = channels
    results: list[Any] = []
    for high in range(math.ceil(columns / 2)):
        ab, cd = _unpack(a, b, 1, lanes, high), _unpack(c, d, 1, lanes, high)
        results += [_unpack(ab, cd, 2, lanes, odd) for odd in (0, 1)]
    return results[:columns]


def _unpack(a: Any, b: Any, width: int, lanes: int, high: int) -> Any:
    """Interleave the elements of ``width`` bytes in the low or high halves of each 128 bits of two int32 vectors."""
    count = 4 * lanes // width
    each = 16 // width
    starts = range(high * each // 2, count, each)
    indices = [i + source for start in starts for i in range(start, start + each // 2) for source in (0, count)]
    dtype = f"int{8 * width}x{count}"
    mixed = tirx.Shuffle([T.reinterpret(dtype, a), T.reinterpret(dtype, b)], indices)
    return T.Bind(T.reinterpret(f"int32x{lanes}", mixed))


def _index_dtype(in_features: int) -> str:
    return "uint16" if in_features <= 1 << 16 else "int32"
