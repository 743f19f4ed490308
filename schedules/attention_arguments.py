"""The parameters of int8 and bfloat16 attention kernels, and how results become quads or pairs in the last of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import QUAD, quantize_rows, words
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, round_bf16, splat, view
from whet.schedules.segments import Queries, Request, Vector, store_from

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionSpec


Keep: TypeAlias = Callable[[Queries, Vector, Any, Any, Callable[[Any], Any]], None]
"""Emits code that keeps probabilities: of these queries' vector, from a first quad of keys on so many; the last gives
the word of a quad."""


@dataclass(frozen=True)
class Arguments:
    """The parameters of an ``i8`` or ``bf16`` kernel; params are None in the latter."""

    tiles: Any
    q: Any
    k: Any
    v: Any
    segments: Any
    params: Any
    out: Any

    @staticmethod
    def declare(spec: AttentionSpec) -> Arguments:
        """Declare the parameters in their order."""
        channels = spec.heads * spec.head_size
        tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
        integer = spec.precision == "i8"
        in_word = QUAD if integer else 2
        unsigned, signed = ("uint8", "int8") if integer else ("uint16", "uint16")
        return Arguments(
            tiles,
            q=parameter("q", (tiles, channels // in_word, TILE, in_word), unsigned),
            k=parameter("k", (tiles, channels // in_word, TILE, in_word), signed),
            v=parameter("v", (tiles, channels, TILE), signed),
            segments=parameter("segments", (groups, TILE, 2), "int32"),
            params=parameter("params", (4,), "float32") if integer else None,
            out=parameter("out", (tiles, channels // in_word, TILE, in_word), unsigned),
        )

    def viewed(self) -> Arguments:
        """The same with the channels of a word as one int32 in q, k and out; four tokens as one int32 in int8's v."""
        v = self.v
        if self.params is not None:
            v = named("values", view(v, (*v.shape[:2], TILE // QUAD), "int32"))
        return replace(self, q=words(self.q), k=words(self.k), v=v, out=words(self.out))

    def context(self, isa: Isa, request: Request, vector: Vector, total: Any) -> Callable[[Any, Sequence[Any]], None]:
        """Return what stores a word of a vector of results from the sums Σ p·v of its channels; ``total`` is Σ p."""
        lanes = isa.lanes
        store_words = store_from(isa, self.out, vector, request)
        if self.params is None:
            inverse = T.Bind(splat(1.0, lanes) / total)
            return lambda word, sums: store_words(word, T.Bind(round_bf16(*(s * inverse for s in sums))))
        inverse = T.Bind(splat(self.params[1], lanes) / T.cast(total, f"float32x{lanes}"))
        zero = T.Bind(splat(self.params[2], lanes))

        def store(quad: Any, sums: Sequence[Any]) -> None:
            rows = [T.cast(s, f"float32x{lanes}") for s in sums]
            store_words(quad, T.Bind(quantize_rows(rows, inverse, zero, isa)))

        return store


def most_tiles(max_length: int) -> int:
    """Most tiles that a request has tokens in: it may start with the last lane of one."""
    return (max_length + TILE - 2) // TILE + 1
