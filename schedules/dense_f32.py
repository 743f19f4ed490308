"""Dense layers in float32: the reference path and layers that stay unquantised."""

from __future__ import annotations

import math
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


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best."""
    if isa.lanes == 16:
        return Blocking(rows=8, tiles=3, chains=16, chunk=64)
    return Blocking(rows=6, tiles=1, chains=12, chunk=64)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(ceil(N / rows), K, rows)``: what one step of a pass broadcasts lies together."""
    return [interleave(weight[:, :, None], knobs.rows)[..., 0]]


def interleave(weight: NDArray[Any], rows: int) -> NDArray[Any]:
    """``(N, steps, item)`` to ``(ceil(N / rows), steps, rows, item)``, with rows of zeros at the end."""
    n, steps, item = weight.shape
    padded = np.zeros((math.ceil(n / rows) * rows, steps, item), weight.dtype)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(-1, rows, steps, item).transpose(0, 2, 1, 3))


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight f32 ``(passes, K, rows)``."""
    n, k, rows = spec.out_features, spec.in_features, knobs.rows
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"dense_f32_{n}x{k}")
        tiles = T.int64()
        x = parameter("x", (tiles, k, TILE), "float32")
        weight = parameter("weight", (math.ceil(n / rows), k, rows), "float32")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(k, tiles),), "float32"))
            group = group_rows(n, rows)

            def reduce(work: Pass, accumulators: Accumulators) -> None:
                base = named("base", T.Bind(tile_offset(k, work.first_tile)))
                index = work.position * (group // rows) + work.index

                def step(j: Any, count: int, registers: Accumulators) -> None:
                    multiply_add(
                        registers,
                        count,
                        lambda column: vector_at(flat, base + j * TILE, column, k * TILE, isa),
                        lambda row: splat(weight[index, j, row], isa.lanes),
                        lambda acc, x, w: fma(x, w, acc),
                    )

                def ahead(j: Any) -> None:
                    prefetch(weight, index, j + PREFETCH_BYTES // (rows * 4), 0)

                accumulate(isa, knobs, work, accumulators, k, step, ahead, "float32")

            loop_nest(isa, knobs, tiles, n, "float32", reduce, epilogue.emit)
    return builder.get()
