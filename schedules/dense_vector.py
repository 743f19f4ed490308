"""Dense layers with every weight: float32, bfloat16, or u8 activations × s8 weights accumulated exactly in int32.

Integers are for instruction sets with VNNI: on AVX2 see whet.schedules.paired_i8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import DenseSpec
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
from whet.schedules.isa import TILE, Isa, fma, prefetch, splat, view

WORD_BYTES = 4


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best."""
    if isa.lanes == 16:
        return Blocking(rows=8, tiles=3, chains=16, chunk=64)
    if spec.weight == "f32":
        return Blocking(rows=6, tiles=1, chains=12, chunk=64)
    return Blocking(rows=4, tiles=1, chains=8, chunk=64)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(ceil(N / rows), words, rows, [channels])``: what one step of a pass broadcasts lies together.

    Rows of zeros stand at the end.
    """
    n, rows, words = spec.out_features, knobs.rows, spec.words
    padded = np.zeros((math.ceil(n / rows) * rows, spec.in_features), weight.dtype)
    padded[:n] = weight
    split = padded.reshape(-1, rows, words, spec.element.channels).transpose(0, 2, 1, 3)
    return [np.ascontiguousarray(split).reshape(-1, words, rows, *spec.element.in_word)]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, words, rows, element = spec.out_features, spec.words, knobs.rows, spec.element
    passes = math.ceil(n / rows)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"dense_{spec.weight}_{n}x{spec.in_features}")
        tiles = T.int64()
        x = parameter("x", (tiles, words, TILE, *element.in_word), element.x)
        weight = parameter("weight", (passes, words, rows, *element.in_word), element.weight)
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(words, tiles),), element.word))
            weight_words = named("weight_words", view(weight, (passes, words, rows), element.word))
            group = group_rows(n, rows)

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                base = named("base", T.Bind(tile_offset(words, work.first_tile)))
                index = work.position * (group // rows) + work.index

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    multiply_add(
                        registers,
                        count,
                        lambda column: vector_at(flat, base + j * TILE, column, words * TILE, isa),
                        lambda row: splat(weight_words[index, j, row], isa.lanes),
                        _product(spec, isa),
                    )

                def ahead(j: Any) -> None:
                    prefetch(weight_words, index, j + PREFETCH_BYTES // (rows * WORD_BYTES), 0)

                accumulate(isa, knobs, work, accumulators, words, step, ahead, element.sums)

            loop_nest(isa, knobs, tiles, n, element.sums, reduce, epilogue.emit)
    return builder.get()


def _product(spec: DenseSpec, isa: Isa) -> Callable[[Any, Any, Any], Any]:
    """Return what adds the products of a word of activations and one of weights."""
    if spec.weight == "f32":
        return lambda acc, x, w: fma(x, w, acc)
    return isa.dot2 if spec.weight == "bf16" else isa.dot4
