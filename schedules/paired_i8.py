"""Int8 layers on AVX2, dense and block-sparse: u8 × s8 by vpmaddubsw, exact because of the order of the blocks.

Each pass over the reduction has a list of the blocks of its rows × 4 input channels that hold a non-zero, two by two:
the products of partners are added in 16 bits, and only that sum is widened. See whet.schedules.pairing.
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
    named,
    parameter,
    tile_offset,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, prefetch, splat, view
from whet.schedules.pairing import paired
from whet.schedules.sparse_i8 import by_length


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether these kernels compute the layer: the instruction set has nothing better, and blocks are whole words."""
    return isa.dot == "madd" and spec.is_integer and (spec.weight == "i8" or spec.block_columns == QUAD)


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best; ``rows`` share a list of blocks.

    More rows use what is loaded more often, but halve more blocks: too many where pruning left large weights.
    """
    if spec.weight == "i8":
        return Blocking(rows=4, tiles=1, chains=1, chunk=64)
    rows = min(spec.block_rows, 2)
    return Blocking(rows=rows, tiles=2 // rows, chains=1, chunk=64)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to eight arrays: bounds, order, indptr, index, flips, masks, corrections, blocks.

    Bounds, order, indptr and blocks are as in ``sparse_i8.pack``, for blocks of ``knobs.rows`` rows, in the order of
    whet.schedules.pairing. ``index`` (uint16, or int32 for very wide layers) is a block's quad times 16, ``flips``
    (uint8) says which channels of it are flipped, ``masks`` (int32) has for each value of that what activations are
    xored with, and ``corrections`` (int32) is what to add to each row, in the order of computation.
    """
    n, k = weight.shape
    rows = knobs.rows
    padded = np.zeros((math.ceil(n / rows) * rows, k), np.int8)
    padded[:n] = weight
    lists = paired(padded.reshape(-1, rows, k // QUAD, QUAD).transpose(0, 2, 1, 3))
    bounds, order, positions, indptr = by_length(lists.counts, n, rows, knobs)
    computed = np.argsort(np.argsort(positions).repeat(lists.counts), kind="stable")
    index, flips, blocks = (a[computed] for a in (lists.quads * TILE, lists.flips, lists.weights))
    if not len(computed):  # no array is empty, not even for a weight of zeros
        index, flips, blocks = np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros((2, rows, QUAD), np.int8)
    masks = np.array([sum(255 << 8 * c for c in range(QUAD) if bits >> c & 1) for bits in range(1 << QUAD)], np.uint32)
    return [
        bounds,
        order,
        indptr.astype(np.int32),
        index.astype(_index_dtype(k)),
        flips.astype(np.uint8),
        masks.view(np.int32),
        lists.corrections()[positions].reshape(-1).astype(np.int32),
        blocks,
    ]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, quads, rows = spec.out_features, spec.in_features // QUAD, knobs.rows
    group = group_rows(n, rows)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"paired_i8_{n}x{spec.in_features}")
        tiles, stored = T.int64(), T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        bounds = parameter("bounds", (chunk_count(knobs, n) + 1,), "int32")
        order = parameter("order", (max(n // group, 1),), "int32")
        indptr = parameter("indptr", (math.ceil(n / rows) + 1,), "int32")
        index = parameter("index", (stored,), _index_dtype(spec.in_features))
        flips = parameter("flips", (stored,), "uint8")
        masks = parameter("masks", (1 << QUAD,), "int32")
        corrections = parameter("corrections", (math.ceil(n / rows) * rows,), "int32")
        weight = parameter("weight", (stored, rows, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(quads, tiles),), "int32"))
            words = named("weight_words", view(weight, (stored, rows), "int32"))

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                base = named("base", T.Bind(tile_offset(quads, work.first_tile)))
                of_rows = work.position * (group // rows) + work.index
                begin = named("block_begin", T.Bind(indptr[of_rows]))
                end = named("block_end", T.Bind(indptr[of_rows + 1]))

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    at = [T.Bind(T.cast(begin + j * 2, "int64") + i) for i in range(2)]
                    of_quads = [T.Bind(base + T.cast(index[a], "int64")) for a in at]
                    flipped = [T.Bind(splat(masks[T.cast(flips[a], "int32")], isa.lanes)) for a in at]
                    columns = range(len(registers[0]))
                    xs = [
                        [T.Bind(vector_at(flat, q, c, quads * TILE, isa) ^ mask) for c in columns]
                        for q, mask in zip(of_quads, flipped, strict=True)
                    ]
                    for row in range(count):
                        sums = [T.Bind(_products(x, splat(words[at[0], row], isa.lanes))) for x in xs[0]]
                        second = T.Bind(splat(words[at[1], row], isa.lanes))
                        for register, x, partner in zip(registers[row], xs[1], sums, strict=True):
                            T.buffer_store(register, register[0] + _widened(partner + _products(x, second)), [0])

                def ahead(j: Any) -> None:
                    prefetch(words, T.cast(begin + j * 2, "int64") + PREFETCH_BYTES // (rows * QUAD), 0)

                accumulate(isa, knobs, work, accumulators, T.truncdiv(end - begin, 2), step, ahead, "int32")
                for row, of_row in enumerate(accumulators):
                    correction = T.Bind(splat(corrections[of_rows * rows + row], isa.lanes))
                    for register in of_row:
                        T.buffer_store(register, register[0] + correction, [0])

            ascending = Order(bound=lambda c: bounds[c], group=lambda position: order[position])
            loop_nest(isa, knobs, tiles, n, "int32", reduce, epilogue.emit, ascending)
    return builder.get()


def _products(x: Any, w: Any) -> Any:
    """Sums of two neighbouring products of bytes, u8 × s8, in 16 bits."""
    bytes_ = (T.reinterpret("int8x32", v) for v in (x, w))
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", *bytes_)


def _widened(sums: Any) -> Any:
    """Sums of two neighbours in 32 bits."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", sums, splat(1, 16, "int16"))


def _index_dtype(in_features: int) -> str:
    return "uint16" if in_features // QUAD * TILE <= 1 << 16 else "int32"
