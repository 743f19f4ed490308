"""The requests of a batch inside a kernel: how the work is cut up, and which lanes are whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat


@dataclass(frozen=True)
class Queries:
    """Vectors of tokens that a kernel works on at once."""

    head: Any
    vectors: list[tuple[Any, Any]]
    """Tile and part of each."""


@dataclass(frozen=True)
class Request:
    """The tokens of one request; rows are counted from the first token of its first tile."""

    entries: Any
    entry: Any
    start: Any
    """First token."""
    length: Any
    first: Any
    """First tile."""
    tiles: Any
    lead: Any
    """First row."""
    end: Any
    """One past the last row."""

    @staticmethod
    def at(entries: Any, entry: Any, start: Any, length: Any) -> Request:
        """The request of an entry of the segments."""
        first = named("first_tile", T.Bind(start // TILE))
        lead = named("lead", T.Bind(start - first * TILE))
        end = named("end", T.Bind(lead + length))
        tiles = named("request_tiles", T.Bind((end + (TILE - 1)) // TILE))
        return Request(entries, entry, start, length, first, tiles, lead, end)

    def blocks(self, size: int) -> tuple[Any, Any]:
        """First of the blocks of ``size`` rows that hold the request, and their number."""
        first = T.Bind(self.lead // size)
        return first, T.Bind((self.end + (size - 1)) // size - first)

    def covers(self, tile: Any) -> Any:
        """Whether the request has tokens in the tile."""
        return tirx.all(tile >= self.first, tile < self.first + self.tiles)

    def is_first_of(self, tile: Any) -> Any:
        """Whether no earlier request has tokens in the tile."""
        return self.entry == self.entries[tile, 0]


def for_each_request(
    isa: Isa,
    heads: int,
    count: int,
    segments: Any,
    tiles: Any,
    prepare: Callable[[], None],
    body: Callable[[Queries, Request], None],
) -> None:
    """Emit ``body`` for all vectors of all tiles, all heads, and each request with tokens there in turn.

    ``count`` vectors are handed over together where a request covers all of them, else one by one. Each unit of
    parallel work, which begins with ``prepare``, has its own vectors, so no two write the same memory.
    """
    entries = _entries_of_tiles(segments, tiles)
    units = named("units", T.Bind((tiles * isa.parts + (count - 1)) // count))
    with T.parallel(heads * units) as task:
        head = named("head", T.Bind(task // units))
        vector = named("vector", T.Bind(task % units * count))
        prepare()
        last = T.Bind(T.min((vector + (count - 1)) // isa.parts, tiles - 1))
        begin = named("begin", T.Bind(entries[vector // isa.parts, 0]))
        with T.serial(entries[last, 1] - begin) as i:
            entry = named("entry", T.Bind(begin + i))
            start, length = _bounds(segments, entry)
            with T.If(length > 0), T.Then():
                request = Request.at(entries, entry, start, length)

                def places(first: Any, number: int) -> list[tuple[Any, Any]]:
                    vectors = [T.Bind(first + n) for n in range(number)]
                    return [(T.Bind(v // isa.parts), T.Bind(v % isa.parts)) for v in vectors]

                together = places(vector, count)
                if count == 1:
                    body(Queries(head, together), request)
                else:
                    with T.If(_opaque(tirx.all(*(request.covers(tile) for tile, _ in together)))):
                        with T.Then():
                            body(Queries(head, together), request)
                        with T.Else(), T.serial(count) as n:
                            alone = places(vector + n, 1)
                            with T.If(_opaque(request.covers(alone[0][0]))), T.Then():
                                body(Queries(head, alone), request)


def _opaque(condition: Any) -> Any:
    """The condition by way of memory: TVM's buffer compaction takes many seconds to draw conclusions from it."""
    flag = T.alloc_buffer((1,), "int32")
    T.buffer_store(flag, T.cast(condition, "int32"), [0])
    return flag[0] != 0


def _entries_of_tiles(segments: Any, tiles: Any) -> Any:
    """First and one past the last entry of ``segments`` ``(ng, 16, 2)`` in each tile: int32 ``(tiles, 2)``.

    One pass over entries and tiles, so that no tile has to search. Tiles of no request get an empty range.
    """
    entries = named("entries", T.alloc_buffer((tiles, 2), "int32"))
    with T.serial(tiles) as tile:
        T.buffer_store(entries, T.int32(0), [tile, 0])
        T.buffer_store(entries, T.int32(0), [tile, 1])
    with T.serial(segments.shape[0] * TILE) as entry:
        start, length = _bounds(segments, entry)
        first = T.Bind(start // TILE)
        with T.serial((start + length + (TILE - 1)) // TILE - first) as i, T.If(length > 0), T.Then():
            tile = T.Bind(first + i)
            with T.If(entries[tile, 1] == 0), T.Then():
                T.buffer_store(entries, T.cast(entry, "int32"), [tile, 0])
            T.buffer_store(entries, T.cast(entry + 1, "int32"), [tile, 1])
    return entries


def _bounds(segments: Any, entry: Any) -> tuple[Any, Any]:
    """First token and length of an entry."""
    start = named("start", T.Bind(segments[entry // TILE, entry % TILE, 0]))
    return start, named("length", T.Bind(segments[entry // TILE, entry % TILE, 1]))


def lanes_before(first_token: Any, token: Any, isa: Isa) -> Any:
    """All ones in those lanes, of a vector whose first lane is token ``first_token``, that come before ``token``.

    As int32, by the sign of a difference: TVM's analysis fails on a vector of comparisons.
    """
    numbers = T.ramp(T.cast(first_token - token, "int32"), 1, isa.lanes)
    return T.shift_right(numbers, splat(31, isa.lanes, "int32"))


def blend(mask: Any, a: Any, b: Any) -> Any:
    """Take int32 ``a`` where ``mask`` is all ones and ``b`` where it is 0."""
    return (a & mask) | (b & ~mask)
