"""Between rows, float32 ``(tokens, C)``, and tiles, float32 ``(nt, C, 16)``, by transposing blocks in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, splat


@dataclass(frozen=True)
class TilesSpec:
    """Conversion between rows ``(t, C)`` and tiles ``(nt, C, 16)``, float32; the input comes first.

    The tokens of the last tile that have no row become 0, or are left out. The tensors must match: nt = ⌈t / 16⌉.
    """

    channels: int


def transpose(rows: Sequence[Any]) -> list[Any]:
    """Transpose as many vectors as they have lanes; a butterfly of two-source shuffles, log2(lanes) deep."""
    lanes = len(rows)
    vectors = list(rows)
    distance = 1
    while distance < lanes:
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                a, b = vectors[i], vectors[i + distance]
                vectors[i] = T.Bind(tirx.Shuffle([a, b], low))
                vectors[i + distance] = T.Bind(tirx.Shuffle([a, b], high))
        distance *= 2
    return vectors


def rows_to_tile(
    load: Callable[[Any, Any, int], Any],
    first: Callable[[int], Any],
    out: Any,
    tile: Any,
    isa: Isa,
) -> None:
    """Fill one tile: ``load(context, c, lanes)`` gives ``lanes`` channels from c of the token with that context.

    ``first(token)`` computes the context of a token of the tile once.
    """
    lanes = isa.lanes
    whole, rest = divmod(int(out.shape[1]), lanes)
    for part in range(isa.parts):
        contexts = [first(part * lanes + i) for i in range(lanes)]
        with T.serial(whole) as block:
            c = block * lanes
            columns = transpose([T.Bind(load(context, c, lanes)) for context in contexts])
            for i, column in enumerate(columns):
                T.buffer_store(out, column, [tile, c + i, T.ramp(part * lanes, 1, lanes)])
        if rest:
            with T.serial(rest) as i:
                for token, context in enumerate(contexts):
                    value = load(context, whole * lanes + i, 1)
                    T.buffer_store(out, value, [tile, whole * lanes + i, part * lanes + token])


def to_tiles(spec: TilesSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel from rows to tiles: arguments x ``(t, C)``, out ``(nt, C, 16)``."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("to_tiles")
            tokens, tiles = named("tokens", T.int64()), named("tiles", T.int64())
            x = parameter("x", (tokens, spec.channels), "float32")
            out = parameter("out", (tiles, spec.channels, TILE), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(tiles) as tile:

                    def first(token: Any) -> tuple[Any, Any]:
                        index = tile * TILE + token
                        exists = T.Select(index < tokens, T.float32(1), T.float32(0))
                        return T.Bind(T.min(index, tokens - 1)), T.Bind(exists)

                    def load(context: tuple[Any, Any], c: Any, lanes: int) -> Any:
                        row, exists = context
                        return x[row, _span(c, lanes)] * (exists if lanes == 1 else splat(exists, lanes))

                    rows_to_tile(load, first, out, tile, isa)
        return builder.get()


def from_tiles(spec: TilesSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel from tiles to rows: arguments x ``(nt, C, 16)``, out ``(t, C)``."""
    lanes = isa.lanes
    whole, rest = divmod(spec.channels, lanes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("from_tiles")
            tokens, tiles = named("tokens", T.int64()), named("tiles", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            out = parameter("out", (tokens, spec.channels), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(tiles) as tile, T.serial(isa.parts) as part:
                    token = named("token", T.Bind(tile * TILE + part * lanes))
                    with T.serial(whole) as block:
                        c = block * lanes
                        columns = [T.Bind(x[tile, c + i, T.ramp(part * lanes, 1, lanes)]) for i in range(lanes)]
                        for i, row in enumerate(transpose(columns)):
                            with T.If(token + i < tokens), T.Then():
                                T.buffer_store(out, row, [token + i, T.ramp(c, 1, lanes)])
                    if rest:
                        with T.serial(T.max(T.min(tokens - token, lanes), 0)) as i, T.serial(rest) as j:
                            c = whole * lanes + j
                            T.buffer_store(out, x[tile, c, part * lanes + i], [token + i, c])
        return builder.get()


def _span(c: Any, lanes: int) -> Any:
    return c if lanes == 1 else T.ramp(c, 1, lanes)
