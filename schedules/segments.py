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
class Request:
    """The tokens of one request, or of several within one tile that are worked on together.

    Rows are counted from the first token of the first tile.
    """

    segments: Any
    entries: Any
    entry: Any
    """First, and for all but tiles that requests share only, entry of the segments."""
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
    def at(segments: Any, entries: Any, entry: Any, start: Any, length: Any) -> Request:
        """The request of an entry of the segments, or those from that entry on."""
        first = named("first_tile", T.Bind(start // TILE))
        lead = named("lead", T.Bind(start - first * TILE))
        end = named("end", T.Bind(lead + length))
        tiles = named("request_tiles", T.Bind((end + (TILE - 1)) // TILE))
        return Request(segments, entries, entry, start, length, first, tiles, lead, end)

    def blocks(self, size: int) -> tuple[Any, Any]:
        """First of the blocks of ``size`` rows that hold the request, and their number."""
        first = T.Bind(self.lead // size)
        return first, T.Bind((self.end + (size - 1)) // size - first)

    def for_each_member(self, body: Callable[[Any, Any], None]) -> None:
        """Emit ``body`` for the first row and the one past the last of each request, if there are several."""
        _, length = _bounds(self.segments, self.entry)
        with T.If(length < self.length), T.Then(), T.serial(self.entries[self.first, 1] - self.entry) as i:
            start, length = _bounds(self.segments, self.entry + i)
            with T.If(tirx.all(length > 0, start < self.start + self.length)), T.Then():
                row = T.Bind(start - self.first * TILE)
                body(row, row + length)

    def is_first_of(self, tile: Any) -> Any:
        """Whether no earlier request has tokens in the tile."""
        return self.entry == self.entries[tile, 0]


@dataclass(frozen=True)
class Queries:
    """Tiles of one request's tokens, and one of the heads: what a kernel works on at once."""

    head: Any
    tile: Any
    """First tile."""
    count: Any
    """Number of tiles, at least 1."""
    request: Request


Vector = tuple[Any, Any]
"""Tile and part of a vector of tokens."""


def for_each_request(
    heads: int,
    unit: int,
    segments: Any,
    tiles: Any,
    prepare: Callable[[], None],
    body: Callable[[Queries], None],
    *,
    shared: bool = False,
    first_only: bool = False,
) -> None:
    """Emit ``body`` for all heads, all runs of ``unit`` tiles, and each request with tokens there in turn.

    With ``shared``, requests that lie within the same tile are handed over as one; with ``first_only``, a request's
    first tile alone. Each unit of parallel work, which begins with ``prepare``, has its own tiles, so no two write the
    same memory.
    """
    entries = _entries_of_tiles(segments, tiles)
    units = named("units", T.Bind((tiles + (unit - 1)) // unit))
    with T.parallel(heads * units) as task:
        # Truncated: a floor, which TVM can't prove to be the same here, takes seconds to compile.
        head = named("head", T.Bind(T.truncdiv(task, units)))
        low = named("low", T.Bind(T.truncmod(task, units) * unit))
        high = named("high", T.Bind(T.min(low + unit, tiles)))
        prepare()
        begin = named("begin", T.Bind(entries[low, 0]))
        done = T.alloc_buffer((1,), "int32")
        T.buffer_store(done, T.int32(0), [0])
        with T.serial(entries[high - 1, 1] - begin) as i:
            entry = named("entry", T.Bind(begin + i))
            start, length = _bounds(segments, entry)
            with T.If(tirx.all(length > 0, start >= done[0])), T.Then():
                end = _shared_end(segments, entries, start, length) if shared else start + length
                T.buffer_store(done, end, [0])
                # By way of memory: TVM's buffer compaction takes minutes to draw conclusions from the expression.
                request = Request.at(segments, entries, entry, start, T.Bind(done[0] - start))
                if first_only:
                    with T.If(request.first >= low), T.Then():
                        body(Queries(head, request.first, T.int32(1), request))
                else:
                    tile = named("tile", T.Bind(T.max(low, request.first)))
                    count = named("tile_count", T.Bind(T.min(high, request.first + request.tiles) - tile))
                    body(Queries(head, tile, count, request))


def for_each_vector(isa: Isa, together: int, queries: Queries, body: Callable[[list[Vector]], None]) -> None:
    """Emit ``body`` for all vectors of the queries: ``together`` at once, then what is left one by one."""

    def places(first: Any, number: int) -> list[Vector]:
        vectors = [T.Bind(first + n) for n in range(number)]
        return [(T.Bind(queries.tile + v // isa.parts), T.Bind(v % isa.parts)) for v in vectors]

    vectors = T.Bind(queries.count * isa.parts)
    whole = T.Bind(vectors // together)
    with T.serial(whole) as i:
        body(places(i * together, together))
    if isa.parts % together:
        with T.serial(vectors - whole * together) as i:
            body(places(whole * together + i, 1))


def _entries_of_tiles(segments: Any, tiles: Any) -> Any:
    """First and one past the last entry of ``segments`` ``(ng, 16, 2)`` in each tile: int32 ``(tiles, 2)``.

    One pass over entries and tiles, so that no tile has to search. Tiles of no request get an empty range, between
    those of their neighbours.
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
    with T.serial(tiles - 1) as i, T.If(entries[i + 1, 1] == 0), T.Then():
        T.buffer_store(entries, entries[i, 1], [i + 1, 0])
        T.buffer_store(entries, entries[i, 1], [i + 1, 1])
    return entries


def _shared_end(segments: Any, entries: Any, start: Any, length: Any) -> Any:
    """One past the last token of the requests from this one on that lie within its tile; its own if it does not."""
    tile = T.Bind(start // TILE)
    end, tile_end = T.Bind(start + length), T.Bind((tile + 1) * TILE)
    last_start, last_length = _bounds(segments, T.Bind(entries[tile, 1] - 1))
    last_end = last_start + last_length
    return T.Select(end > tile_end, end, T.Select(last_end > tile_end, T.max(end, last_start), last_end))


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


def store_from(isa: Isa, out: Any, vector: Vector, request: Request) -> Callable[[Any, Any], None]:
    """Return what stores an int32 vector of a row of ``out`` ``(nt, rows, 16)``: lanes before the request keep theirs.

    Requests come in ascending order, so what is written past a request's end is overwritten.
    """
    tile, part = vector
    at = T.ramp(part * isa.lanes, 1, isa.lanes)
    others = T.Bind(lanes_before(tile * TILE + part * isa.lanes, request.start, isa))

    def store(row: Any, value: Any) -> None:
        T.buffer_store(out, blend(others, out[tile, row, at], value), [tile, row, at])

    return store
