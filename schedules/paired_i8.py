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
    """``(N, K)`` to five arrays: bounds, order, indptr, index, blocks.

    As ``sparse_i8.pack``, but for blocks of ``knobs.rows`` rows, and in the order of whet.schedules.pairing; ``index``
    (uint16, or int32 for very wide layers) is the block's quad times 16.
    """
    n, k = weight.shape
    rows = knobs.rows
    padded = np.zeros((math.ceil(n / rows) * rows, k), np.int8)
    padded[:n] = weight
    counts, quads, values = paired(padded.reshape(-1, rows, k // QUAD, QUAD).transpose(0, 2, 1, 3))
    bounds, order, positions, indptr = by_length(counts, n, rows, knobs)
    stored = np.arange(quads.shape[1]) < counts[positions, None]
    index, blocks = quads[positions][stored] * TILE, values[positions][stored]
    if not len(index):  # no array is empty, not even for a weight of zeros
        index, blocks = np.zeros(2, np.int64), np.zeros((2, rows, QUAD), np.int8)
    return [bounds, order, indptr.astype(np.int32), index.astype(_index_dtype(k)), blocks]


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
                    columns = range(len(registers[0]))
                    xs = [[T.Bind(vector_at(flat, q, c, quads * TILE, isa)) for q in of_quads] for c in columns]
                    for row in range(count):
                        ws = [T.Bind(splat(words[a, row], isa.lanes)) for a in at]
                        for register, x_pair in zip(registers[row], xs, strict=True):
                            T.buffer_store(register, _add_products(register[0], x_pair, ws), [0])

                def ahead(j: Any) -> None:
                    prefetch(words, T.cast(begin + j * 2, "int64") + PREFETCH_BYTES // (rows * QUAD), 0)

                accumulate(isa, knobs, work, accumulators, T.truncdiv(end - begin, 2), step, ahead, "int32")

            ascending = Order(bound=lambda c: bounds[c], group=lambda position: order[position])
            loop_nest(isa, knobs, tiles, n, "int32", reduce, epilogue.emit, ascending)
    return builder.get()


def _add_products(acc: Any, xs: list[Any], ws: list[Any]) -> Any:
    """``acc + Σ x[i]·w[i]`` per lane over 4 bytes of two blocks, which keep the rule of whet.schedules.pairing."""

    def call(dtype: str, name: str, a: Any, b: Any) -> Any:
        return T.call_llvm_pure_intrin(dtype, f"llvm.x86.avx2.{name}", a, b)

    first, second = (
        call("int16x16", "pmadd.ub.sw", T.reinterpret("int8x32", x), T.reinterpret("int8x32", w))
        for x, w in zip(xs, ws, strict=True)
    )
    return acc + call("int32x8", "pmadd.wd", first + second, splat(1, 16, "int16"))


def _index_dtype(in_features: int) -> str:
    return "uint16" if in_features // QUAD * TILE <= 1 << 16 else "int32"
