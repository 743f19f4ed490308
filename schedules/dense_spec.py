"""What a dense layer is, independent of how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from whet.schedules.vector_math import ACTIVATIONS

QUAD = 4
"""Channels in a quad."""

Weight: TypeAlias = Literal["f32", "bf16", "i8", "i8_sparse", "i8_expanded"]
Output: TypeAlias = Literal["tiles", "pairs", "quads", "heads", "values"]
HEADS: dict[Output, str] = {"heads": "qkv", "values": "v"}
"""What of an attention's Q, K and V a layer computes, by its output."""

_BLOCKS = ((1, 4), (2, 4), (4, 4), (8, 4), (16, 4), (4, 1))
BLOCKS: dict[Weight, tuple[tuple[int, int], ...]] = {"i8_sparse": _BLOCKS, "i8_expanded": ((1, 1), *_BLOCKS)}
"""Output rows × input channels that a block may have, for each way to leave out zeros."""


@dataclass(frozen=True)
class Element:
    """What a kernel multiplies."""

    channels: int
    """Of a token in a word of 32 bits, which is what instructions take."""
    x: str
    """Type of an activation."""
    weight: str
    word: str
    sums: str
    """Type of what products are added to."""

    @property
    def in_word(self) -> tuple[int, ...]:
        """Last dimensions of buffers of elements: those of a word, if it has several."""
        return (self.channels,) if self.channels > 1 else ()


_INTEGER = Element(QUAD, "uint8", "int8", "int32", "int32")
# NumPy and TVM's code generator have no bfloat16: uint16 holds its bits.
ELEMENTS: dict[Weight, Element] = {
    "f32": Element(1, "float32", "float32", "float32", "float32"),
    "bf16": Element(2, "uint16", "uint16", "int32", "float32"),
    "i8": _INTEGER,
    "i8_sparse": _INTEGER,
    "i8_expanded": _INTEGER,
}


@dataclass(frozen=True)
class DenseSpec:
    """``activation(W·x + b) + residual`` per token.

    ``weight`` says how W is stored and with it what x is: tiles for f32, pairs for bf16, quads u8 for integers. Blocks
    of ``block_rows`` output rows × ``block_columns`` input channels that are all zero are left out of memory and
    arithmetic by i8_sparse, of memory alone by i8_expanded. ``per_token`` dequantises with a scale and zero point of
    each token instead of the tensor's.

    ``output`` is f32 tiles; or what the next layer multiplies, quads u8, requantised, from integers and pairs, rounded,
    from bf16; or "heads", where the layer is the fused Q, K and V of an attention (``out_features`` = 3 × hidden): Q as
    quads u8 with zero point 128, K as quads s8, V as value rows s8, each already scaled by ``scale`` and ``bias``; from
    bf16 as pairs, pairs and value rows. "values" is a layer for V alone.

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
    def element(self) -> Element:
        """What is multiplied."""
        return ELEMENTS[self.weight]

    @property
    def words(self) -> int:
        """Words of a token's input channels."""
        return self.in_features // self.element.channels

    @property
    def is_integer(self) -> bool:
        """Whether sums are integers, which are scaled."""
        return self.element.sums == "int32"

    @property
    def block(self) -> tuple[int, int]:
        """Output rows and input channels of a sparse block."""
        return self.block_rows, self.block_columns

    def __post_init__(self) -> None:
        _one_of("weight", self.weight, get_args(Weight))
        if self.weight in BLOCKS:
            _one_of("block", self.block, BLOCKS[self.weight])
        _one_of("activation", self.activation, tuple(ACTIVATIONS))
        _one_of("output", self.output, get_args(Output))
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a dense layer of {self.out_features} × {self.in_features}; both sizes must be positive")
        if self.per_token and not self.is_integer:
            raise ValueError(f"per_token needs an int8 weight; this one is {self.weight}")
        if self.output in HEADS and self.weight == "f32":
            raise ValueError(f"output {self.output!r} needs an int8 or bf16 weight; this one is f32")
        if (self.output == "pairs") != (self.weight == "bf16") and self.output in ("pairs", "quads"):
            raise ValueError(
                f"output is {self.output!r}; bf16 weights give pairs, others quads; this one is {self.weight}"
            )
        if self.in_features % self.element.channels:
            raise ValueError(
                f"in_features is {self.in_features}; {self.weight} kernels need a multiple of {self.element.channels}: "
                "pad or use f32"
            )
        multiple = 1 if self.output == "tiles" else QUAD * len(HEADS.get(self.output, "1"))
        if self.out_features % multiple:
            raise ValueError(
                f"out_features is {self.out_features}; output {self.output!r} needs a multiple of {multiple}"
            )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")
