"""The requests of a batch inside a kernel: which of them overlap a tile, and which lanes are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T
from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat


def entries_of_tiles(segments: Any, tiles: Any) -> Any:
    """First and one past the last entry of ``segments`` ``(ng, 16, 2)`` in each tile: int32 ``(tiles, 2)``.

    One pass over entries and tiles, so that no tile has to search.
    """
    entries = named("entries", T.alloc_buffer((tiles, 2), "int32"))
    with T.serial(tiles) as tile:
        T.buffer_store(entries, T.int32(0), [tile, 0])
        T.buffer_store(entries, T.int32(0), [tile, 1])
    with T.serial(segments.shape[0] * TILE) as entry:
        start, length = bounds(segments, entry)
        first = T.Bind(start // TILE)
        with T.serial((start + length + (TILE - 1)) // TILE - first) as i, T.If(length > 0), T.Then():
            tile = T.Bind(first + i)
            with T.If(entries[tile, 1] == 0), T.Then():
                T.buffer_store(entries, T.cast(entry, "int32"), [tile, 0])
            T.buffer_store(entries, T.cast(entry + 1, "int32"), [tile, 1])
    return entries


def bounds(segments: Any, entry: Any) -> tuple[Any, Any]:
    """First token and length of an entry."""
    start = named("start", T.Bind(segments[entry // TILE, entry % TILE, 0]))
    return start, named("length", T.Bind(segments[entry // TILE, entry % TILE, 1]))


def for_each_segment(entries: Any, segments: Any, tile: Any, body: Callable[[Any, Any, Any], None]) -> None:
    """Emit ``body(is_first, start, length)`` for each request that has tokens in the tile, in ascending order."""
    with T.serial(entries[tile, 1] - entries[tile, 0]) as i:
        start, length = bounds(segments, entries[tile, 0] + i)
        with T.If(length > 0), T.Then():
            body(i == 0, start, length)


def lanes_before(first_token: Any, token: Any, isa: Isa) -> Any:
    """All ones in those lanes, of a vector whose first lane is token ``first_token``, that come before ``token``.

    As int32, by the sign of a difference: TVM's analysis fails on a vector of comparisons.
    """
    numbers = T.ramp(T.cast(first_token - token, "int32"), 1, isa.lanes)
    return T.shift_right(numbers, splat(31, isa.lanes, "int32"))


def blend(mask: Any, a: Any, b: Any) -> Any:
    """Take int32 ``a`` where ``mask`` is all ones and ``b`` where it is 0."""
    return (a & mask) | (b & ~mask)
