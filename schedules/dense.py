"""Dense layers: what a layer is, and the one entry to the kernels for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.schedules import dense_amx, dense_vector, expanded_amx, paired_i8, sparse_channel_i8, sparse_i8, sparse_low_i8
from whet.schedules.dense_spec import BLOCKS, QUAD, DenseSpec, Output, Weight
from whet.schedules.gemm import Blocking
from whet.schedules.isa import Isa

__all__ = ["BLOCKS", "DenseKernel", "DenseSpec", "Output", "Weight", "dense", "family_of", "supports"]


@dataclass(frozen=True)
class DenseKernel:
    """A kernel for one layer shape.

    ``func`` takes x, the packed weight arrays, scale f32 (N,) [int8 only], bias f32 (N,), [row_sums f32 (N,) and
    token_params f32 (tiles, 2, 16) if per_token], [residual tiles], [requant f32 (N + 1,) = 1/s of each channel, zero
    if output is quads], and the output (three of them for "heads").
    """

    spec: DenseSpec
    isa: Isa
    knobs: Blocking
    func: Any
    pack: Callable[[NDArray[Any]], list[NDArray[Any]]]
    """From a weight (N, K), float32, bfloat16 (its bits as uint16) or int8, to packed arrays in ``func``'s order."""


def family_of(spec: DenseSpec, isa: Isa) -> Any:
    """Return the module that makes kernels for such layers: it has ``default_knobs``, ``pack`` and ``kernel``."""
    if dense_amx.supports(spec, isa):
        return dense_amx
    if not supports(spec, isa):
        raise ValueError(f"there is no kernel for {isa.name} that expands the weights of {spec}; use i8_sparse or i8")
    if spec.weight == "i8_expanded":
        return expanded_amx
    if paired_i8.supports(spec, isa):
        return paired_i8
    if spec.weight == "i8_sparse":
        if spec.block_columns == 1:
            return sparse_channel_i8
        return sparse_low_i8 if spec.block_rows < QUAD else sparse_i8
    return dense_vector


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether there is a kernel for the layer: weights are expanded on AMX only."""
    return spec.weight != "i8_expanded" or expanded_amx.supports(spec, isa)


def dense(spec: DenseSpec, isa: Isa, knobs: Blocking | None = None) -> DenseKernel:
    """Generate the kernel for a layer; ``knobs`` default to what is good on ``isa``."""
    family = family_of(spec, isa)
    knobs = knobs or family.default_knobs(spec, isa)
    dtype = np.dtype(spec.element.weight)

    def pack(weight: NDArray[Any]) -> list[NDArray[Any]]:
        expected = (spec.out_features, spec.in_features)
        if weight.shape != expected or weight.dtype != dtype:
            raise ValueError(f"weight is {weight.dtype} {weight.shape}; expected {dtype} {expected}")
        packed: list[NDArray[Any]] = family.pack(weight, spec, knobs)
        return packed

    return DenseKernel(spec, isa, knobs, family.kernel(spec, isa, knobs), pack)
