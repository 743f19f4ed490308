"""Dense int8 layers: every quad of every row, u8 activations × s8 weights, accumulated exactly in int32."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_f32 import interleave
from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import (
    PREFETCH_BYTES,
    Accumulators,
    Blocking,
    Pass,
    accumulate,
    group_rows,
    loop_nest,
    multiply_add,
    named,
    parameter,
    tile_offset,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, prefetch, splat, view


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best."""
    if isa.lanes == 16:
        return Blocking(rows=8, tiles=3, chains=16, chunk=64)
    return Blocking(rows=6 if isa.dot == "madd" else 4, tiles=1, chains=8, chunk=64)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(ceil(N / rows), K / 4, rows, 4)``: what one step of a pass broadcasts lies together."""
    return [interleave(weight.reshape(spec.out_features, -1, QUAD), knobs.rows)]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight s8 ``(passes, K/4, rows, 4)``."""
    n, quads, rows = spec.out_features, spec.in_features // QUAD, knobs.rows
    passes = math.ceil(n / rows)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"dense_i8_{n}x{spec.in_features}")
        tiles = T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        weight = parameter("weight", (passes, quads, rows, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(quads, tiles),), "int32"))
            words = named("weight_words", view(weight, (passes, quads, rows), "int32"))
            group = group_rows(n, rows)

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                base = named("base", T.Bind(tile_offset(quads, work.first_tile)))
                index = work.position * (group // rows) + work.index

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    multiply_add(
                        registers,
                        count,
                        lambda column: vector_at(flat, base + j * TILE, column, quads * TILE, isa),
                        lambda row: splat(words[index, j, row], isa.lanes),
                        isa.dot4,
                    )

                def ahead(j: Any) -> None:
                    prefetch(words, index, j + PREFETCH_BYTES // (rows * QUAD), 0)

                accumulate(isa, knobs, work, accumulators, quads, step, ahead, "int32")

            loop_nest(isa, knobs, tiles, n, "int32", reduce, epilogue.emit)
    return builder.get()
