"""Block-sparse int8 layers on AMX: zeros are left out of memory and put back on the way to the tile registers.

AMX multiplies so fast that what it waits for are weights: with a bit mask for the blocks that hold anything and only
their values, fewer bytes come from the last-level cache. VPEXPANDD and VPEXPANDB put a row's values where they belong.
Any mask works, and on many tokens no dense layer is faster: each weight is expanded once for all of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from whet.schedules import gemm_amx
from whet.schedules.amx import ROW_BYTES, ROWS
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.gemm import Blocking, named, parameter
from whet.schedules.gemm_amx import WORD, Plan, Weights, Work
from whet.schedules.isa import Isa, prefetch, view

MASKS: dict[int, np.dtype[Any]] = {4: np.dtype(np.uint16), 1: np.dtype(np.uint64)}
"""A bit for each block of a step, by the width of a block."""

AHEAD = 4096
"""Bytes of values that are prefetched ahead of their use."""

default_knobs = gemm_amx.default_knobs


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether this family computes the layer, and fast."""
    return spec.weight == "i8_expanded" and gemm_amx.suits(spec, isa)


def mask_bytes(spec: DenseSpec) -> int:
    """Bytes of the masks of a layer."""
    groups = math.ceil(spec.out_features / spec.block_rows)
    return groups * gemm_amx.steps(spec) * MASKS[spec.block_columns].itemsize


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to three arrays: starts, masks, values.

    A step's blocks are in the order group of ``block_rows`` rows, row, channel. ``masks`` (uint16 or uint64
    ``(steps, groups)``) has a bit for each block of a group; the ``values`` (s8 ``(…, block_columns)``) of step s are
    those from ``starts[s]`` (int32) on, and a row register's bytes more, which the kernel may read.
    """
    (height, width), rows, depth = spec.block, knobs.rows, gemm_amx.depth_of(spec)
    padded = np.zeros((math.ceil(spec.out_features / rows) * rows, spec.in_features), np.int8)
    padded[: spec.out_features] = weight
    blocks = padded.reshape(-1, rows // height, height, gemm_amx.steps(spec), depth * WORD // width, width)
    blocks = blocks.transpose(0, 3, 1, 2, 4, 5).reshape(-1, *(blocks.shape[i] for i in (1, 2, 4, 5)))
    present: NDArray[Any] = np.asarray(blocks.any(axis=(2, 4)))  # (steps, groups, blocks)
    starts = np.concatenate([[0], np.cumsum(present.sum(axis=(1, 2)) * height)]).astype(np.int32)
    dtype = MASKS[width]
    bits = np.left_shift(np.ones((), dtype), np.arange(present.shape[-1], dtype=dtype))
    masks = (present * bits).sum(axis=2, dtype=dtype)
    values = blocks[np.broadcast_to(present[:, :, None], blocks.shape[:-1])]
    return [starts, masks, np.concatenate([values, np.zeros((ROW_BYTES // width, width), np.int8)])]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    name = f"expanded_amx_{spec.block_rows}x{spec.block_columns}"
    return gemm_amx.generate(name, spec, isa, knobs, _Expanded())


class _Expanded(Weights):
    """Expanded in the first-level cache, over the chunk in use: a step's weights are loaded before they give way."""

    def declare(self, spec: DenseSpec, plan: Plan) -> None:
        (height, width), steps, stored = spec.block, plan.passes * plan.steps, T.int64()
        self.plan, self.height, self.width = plan, height, width
        self.starts = parameter("starts", (steps + 1,), "int32")
        self.masks = parameter("masks", (steps, plan.rows // height), MASKS[width].name)
        self.stored = parameter("values", (stored, width), "int8")

    def begin(self, step: Any, count: Any) -> None:
        words = (self.plan.chunk * self.plan.rows, ROW_BYTES // WORD)
        self.chunk = named("chunk_weights", T.alloc_buffer(words, "int32"))
        # One element is one block's part of a row.
        self.dtype = f"int{8 * self.width}"
        self.values = named("row_values", view(self.stored, self.stored.shape[:1], self.dtype))
        with T.serial(count) as k:
            self.expand(step + k, k)

    def at(self, work: Work, k: Any, row_tile: int) -> tuple[Any, int]:
        row = k * self.plan.rows + row_tile * ROWS
        return self.chunk.access_ptr("rw", offset=row * (ROW_BYTES // WORD)), ROW_BYTES

    def ahead(self, work: Work, k: Any) -> None:
        with T.If(k < work.next_steps), T.Then():
            self.expand(self.after(work) + k, k)

    def rest(self, work: Work) -> None:
        if self.plan.steps % self.plan.chunk == 0:
            return  # all chunks are of the same length
        with T.serial(T.max(work.next_steps - work.steps, 0)) as i:
            k = T.Bind(work.steps + i)
            self.expand(self.after(work) + k, k)

    def after(self, work: Work) -> Any:
        """First step of the next chunk."""
        return work.index * self.plan.steps + work.first_step + work.steps

    def expand(self, step: Any, k: Any) -> None:
        """Put the weights of a step, counted over all passes, where step k of the chunk stands."""
        lanes = ROW_BYTES // self.width
        flat = view(self.chunk, (self.plan.chunk * self.plan.rows * lanes,), self.dtype)
        vector = f"{self.dtype}x{lanes}"
        at = T.Bind(T.cast(self.starts[step], "int64"))
        for group in range(self.plan.rows // self.height):
            mask = T.Bind(self.masks[step, group])
            bits = T.reinterpret(f"uint1x{lanes}", mask)
            kept = T.Bind(T.cast(T.popcount(T.cast(mask, "int64")), "int64"))
            for r in range(self.height):
                row = group * self.height + r
                values = self.values[T.ramp(at + kept * r, 1, lanes)]
                zeros = T.broadcast(T.IntImm(self.dtype, 0), lanes)
                full = T.call_llvm_pure_intrin(vector, "llvm.x86.avx512.mask.expand", values, zeros, bits)
                T.buffer_store(flat, full, [T.ramp((k * self.plan.rows + row) * lanes, 1, lanes)])
                if row % 2 == 0:
                    prefetch(self.values, at + kept * r + AHEAD // self.width, level=2)
            at = T.Bind(at + kept * self.height)
