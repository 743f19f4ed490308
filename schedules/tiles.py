"""From rows, float32 ``(tokens, C)``, to tiles, float32 ``(nt, C, 16)``, by transposing blocks in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from whet.schedules.isa import Isa


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
