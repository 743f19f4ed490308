"""The parameters of int8 attention kernels, and how results become quads in the last of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import QUAD, quantize_rows, words
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, splat, view
from whet.schedules.segments import Request, Vector, store_from

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionSpec


@dataclass(frozen=True)
class Arguments:
    """The parameters of an ``i8`` kernel; q, k, v and out also as int32."""

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
        return Arguments(
            tiles,
            q=parameter("q", (tiles, channels // QUAD, TILE, QUAD), "uint8"),
            k=parameter("k", (tiles, channels // QUAD, TILE, QUAD), "int8"),
            v=parameter("v", (tiles, channels, TILE), "int8"),
            segments=parameter("segments", (groups, TILE, 2), "int32"),
            params=parameter("params", (4,), "float32"),
            out=parameter("out", (tiles, channels // QUAD, TILE, QUAD), "uint8"),
        )

    def viewed(self) -> Arguments:
        """The same with four bytes as one int32: of channels in q, k and out, of tokens in v."""
        v = named("values", view(self.v, (*self.v.shape[:2], TILE // QUAD), "int32"))
        return replace(self, q=words(self.q), k=words(self.k), v=v, out=words(self.out))

    def context(self, isa: Isa, request: Request, vector: Vector, total: Any) -> Callable[[Any, Sequence[Any]], None]:
        """Return what stores a quad of a vector of results from the sums Σ p·v of its channels; ``total`` is Σ p."""
        lanes = isa.lanes
        inverse = T.Bind(splat(self.params[1], lanes) / T.cast(total, f"float32x{lanes}"))
        zero = T.Bind(splat(self.params[2], lanes))
        store_words = store_from(isa, self.out, vector, request)

        def store(quad: Any, sums: Sequence[Any]) -> None:
            rows = [T.cast(s, f"float32x{lanes}") for s in sums]
            store_words(quad, T.Bind(quantize_rows(rows, inverse, zero, isa)))

        return store


def most_tiles(max_length: int) -> int:
    """Most tiles that a request has tokens in: it may start with the last lane of one."""
    return (max_length + TILE - 2) // TILE + 1
