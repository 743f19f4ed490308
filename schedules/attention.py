"""Attention within each request of a packed batch: what to compute, and which kernel computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from whet.schedules import attention_amx
from whet.schedules.attention_f32 import attention_f32
from whet.schedules.attention_softmax import MAX_HEAD_SIZE
from whet.schedules.attention_vector import attention_vector
from whet.schedules.isa import Isa


@dataclass(frozen=True)
class AttentionSpec:
    """``softmax(Q·Kᵀ)·V`` per head and request.

    Arguments for i8: q ``(nt, C/4, 16, 4)`` uint8 with zero point 128, k like q but int8, v ``(nt, C, 16)`` int8,
    segments ``(ng, 16, 2)`` int32, params ``(4,)`` float32, out ``(nt, C/4, 16, 4)`` uint8; C = heads × head_size. The
    params are the factor of the scores, that of the result, and its zero point:

        p = round(255 · exp(score − max score)),  score = params[0] · (q − 128)·k
        out = clamp(round(params[1] · Σ p·v / Σ p + params[2]), 0, 255)

    where the exponential's approximation moves 255 · exp by 0.16 at most before it is rounded. Every instruction set
    gives the same bytes.

    Arguments for bf16, whose bits are uint16: q and k ``(nt, C/2, 16, 2)``, v ``(nt, C, 16)``, segments, out like q.
    The factor of the scores is ``scale``. Products are added, and exponentials computed, in float32; the exponentials
    are rounded to bfloat16, and their sum is that of the rounded.

    Arguments for f32: qkv ``(nt, 3C, 16)`` with the channels of Q, K, V in turn, segments, out ``(nt, C, 16)``; the
    factor of the scores is ``scale``, and lanes of no request become 0.
    """

    heads: int
    head_size: int
    precision: Literal["i8", "bf16", "f32"]
    max_length: int
    """Longest request in tokens; the kernel has room for no more and does not check."""
    scale: float = 1.0
    first_only: bool = False
    """Attend for the tokens of each request's first tile, and write no others: where only first tokens are read."""

    def __post_init__(self) -> None:
        if self.precision not in ("i8", "bf16", "f32"):
            raise ValueError(f"precision is {self.precision!r}; expected 'i8', 'bf16' or 'f32'")
        if self.precision != "f32" and self.head_size % 4:
            raise ValueError(
                f"head_size is {self.head_size}; {self.precision} attention needs a multiple of 4, so pad the heads"
            )
        if self.precision == "i8" and self.head_size > MAX_HEAD_SIZE:
            raise ValueError(f"head_size is {self.head_size}; int8 attention takes at most {MAX_HEAD_SIZE}, so use f32")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; expected at least 1")


@dataclass(frozen=True)
class AttentionKnobs:
    """How an attention kernel uses the registers."""

    queries: int
    """Vectors of queries that share the loads of keys and values."""
    accumulators: int
    """Sums in registers: queries × keys of the first product, queries × channels of the second."""
    unit: int = 4
    """Tiles of queries that are one unit of parallel work; what is prepared of keys and values serves one unit."""

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"{self}: unit must be at least 1")
        if self.queries < 1 or self.accumulators % self.queries or self.accumulators // self.queries not in (4, 8, 16):
            raise ValueError(f"{self}: accumulators / queries must be 4, 8 or 16")

    @staticmethod
    def default(spec: AttentionSpec, isa: Isa) -> AttentionKnobs:
        """Half of the registers for the sums; all where that shares the widening of bytes to 16 bits.

        AMX prepares the most, hence its large units.
        """
        if spec.precision == "i8" and isa.dot == "madd":
            return AttentionKnobs(4, 16)
        if attention_amx.supports(spec, isa):
            return AttentionKnobs(2, isa.registers // 2, unit=16)
        return AttentionKnobs(2, isa.registers // 2)


def attention(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs | None = None) -> tirx.PrimFunc:
    """Attention kernel, parallel over heads and tiles of queries; the arguments are the specification's."""
    if attention_amx.supports(spec, isa):
        generate = attention_amx.attention_amx
    else:
        generate = attention_f32 if spec.precision == "f32" else attention_vector
    return generate(spec, isa, knobs or AttentionKnobs.default(spec, isa))
