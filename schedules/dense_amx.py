"""Dense layers on AMX, int8 or bfloat16: weights go from memory to the tile registers as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from whet.schedules import gemm_amx
from whet.schedules.amx import ROWS
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.gemm import Blocking, parameter
from whet.schedules.gemm_amx import WORD, Plan, Weights, Work
from whet.schedules.isa import Isa, prefetch, view

LINE = 64
"""Bytes of a cache line."""

default_knobs = gemm_amx.default_knobs


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether this family computes the layer, and fast."""
    weight = "bf16" if isa.dot == "bf16" else "i8"
    return spec.weight == weight and gemm_amx.suits(spec, isa)


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(steps of all passes, rows / 16, 16, depth, channels)``: tile registers in order of use."""
    rows, depth = knobs.rows, gemm_amx.depth_of(spec)
    padded = np.zeros((math.ceil(spec.out_features / rows) * rows, spec.in_features), weight.dtype)
    padded[: spec.out_features] = weight
    split = padded.reshape(-1, rows // ROWS, ROWS, gemm_amx.steps(spec), depth, spec.element.channels)
    packed = np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4, 5))
    return [packed.reshape(-1, *packed.shape[2:])]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    return gemm_amx.generate(f"dense_amx_{spec.weight}", spec, isa, knobs, _Stored())


class _Stored(Weights):
    """As they lie in memory."""

    def declare(self, spec: DenseSpec, plan: Plan) -> None:
        self.plan = plan
        shape = (plan.passes * plan.steps, plan.rows // ROWS, ROWS, plan.depth, spec.element.channels)
        self.weight = parameter("weight", shape, spec.element.weight)

    def begin(self, step: Any, count: Any) -> None:
        pass

    def at(self, work: Work, k: Any, row_tile: int) -> tuple[Any, int]:
        step = work.index * self.plan.steps + work.first_step + k
        return T.address_of(self.weight[step, row_tile, 0, 0, 0]), self.plan.depth * WORD

    def ahead(self, work: Work, k: Any) -> None:
        """Prefetch: each token block an equal part of the next chunk, so that it goes in order."""
        lines = self.plan.rows * self.plan.depth * WORD // LINE
        flat = view(self.weight, (self.plan.passes * self.plan.steps * lines * LINE,), "int8")
        done = T.Bind(work.number * work.steps + k)
        begin, end = (T.Bind(T.truncdiv(p * lines, work.of)) for p in (done, done + 1))
        start = T.Bind(T.cast(work.index * self.plan.steps + work.first_step + work.steps, "int64") * (lines * LINE))
        with T.serial(end - begin) as i:
            prefetch(flat, start + (begin + i) * LINE, level=2)

    def rest(self, work: Work) -> None:
        pass
