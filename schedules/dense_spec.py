"""What a dense layer is, independent of how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from whet.schedules.vector_math import ACTIVATIONS

QUAD = 4
"""Channels in a quad."""

Weight: TypeAlias = Literal["f32", "i8", "i8_sparse"]
Output: TypeAlias = Literal["tiles", "quads", "heads"]

BLOCKS = ((1, 4), (2, 4), (4, 4), (8, 4), (16, 4), (4, 1))
"""Output rows × input channels that a sparse block may have."""


@dataclass(frozen=True)
class DenseSpec:
    """``activation(W·x + b) + residual`` per token.

    ``weight`` says how W is stored and with it what x is: tiles for f32, quads u8 for i8 and i8_sparse (blocks of
    ``block_rows`` output rows × ``block_columns`` input channels). ``per_token`` dequantises with a scale and zero
    point of each token instead of the tensor's. ``output`` is f32 tiles; or quads u8, requantised; or "heads", where
    the layer is the fused Q, K and V of an attention (``out_features`` = 3 × hidden): Q as quads u8 with zero point
    128, K as quads s8, V as value rows s8, each already scaled by ``scale`` and ``bias``.

    Raises ValueError for sizes and combinations that no kernel computes.
    """

    out_features: int
    in_features: int
    weight: Weight
    block_rows: int = 4
    block_columns: int = QUAD
    activation: str = "none"
    residual: bool = False
    per_token: bool = False
    output: Output = "tiles"

    @property
    def block(self) -> tuple[int, int]:
        """Output rows and input channels of a sparse block."""
        return self.block_rows, self.block_columns

    def __post_init__(self) -> None:
        _one_of("weight", self.weight, get_args(Weight))
        _one_of("block", self.block, BLOCKS)
        _one_of("activation", self.activation, tuple(ACTIVATIONS))
        _one_of("output", self.output, get_args(Output))
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a dense layer of {self.out_features} × {self.in_features}; both sizes must be positive")
        if self.weight == "f32":
            if self.per_token or self.output == "heads":
                raise ValueError("per_token and output 'heads' need an int8 weight; this one is f32")
        elif self.in_features % QUAD:
            raise ValueError(f"in_features is {self.in_features}; int8 kernels need a multiple of 4: pad or use f32")
        multiple = {"tiles": 1, "quads": QUAD, "heads": 3 * QUAD}[self.output]
        if self.out_features % multiple:
            raise ValueError(
                f"out_features is {self.out_features}; output {self.output!r} needs a multiple of {multiple}"
            )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")
