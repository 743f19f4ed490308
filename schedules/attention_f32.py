"""Attention in float32, for the reference path: queries are the lanes, as in whet.schedules.attention_i8.

Sums run over the keys of a request one after the other, so the result does not depend on where in a tile it starts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from whet.schedules.elementwise import lanes_of
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, fma, splat
from whet.schedules.segments import blend, entries_of_tiles, for_each_segment, lanes_before
from whet.schedules.vector_math import exp2_of_product

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_LEAST_EXPONENT = -200.0
"""2^-200 is 0 in float32, so smaller scores need no telling apart."""


def attention_f32(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``f32`` specification."""
    channels = spec.heads * spec.head_size
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention_f32")
            tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
            qkv = parameter("qkv", (tiles, 3 * channels, TILE), "float32")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            out = parameter("out", (tiles, channels, TILE), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                entries = entries_of_tiles(segments, tiles)
                vectors = tiles * isa.parts
                with T.parallel(spec.heads * vectors) as task:
                    head = named("head", T.Bind(task // vectors))
                    tile = named("tile", T.Bind(task % vectors // isa.parts))
                    part = named("part", T.Bind(task % isa.parts))
                    queries = _Queries(spec, isa, knobs, (qkv, out), (head, tile, part))
                    for_each_segment(entries, segments, tile, queries.attend)
        return builder.get()


class _Queries:
    """The attention of one vector of queries and one head: a unit of parallel work."""

    def __init__(
        self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, buffers: tuple[Any, ...], place: tuple[Any, ...]
    ) -> None:
        self.spec, self.isa, self.knobs = spec, isa, knobs
        self.qkv, self.out = buffers
        head, self.tile, self.part = place
        channels = spec.heads * spec.head_size
        self.q, self.k, self.v = (named(n, T.Bind(head * spec.head_size + i * channels)) for i, n in enumerate("qkv"))
        rows = -(-(spec.max_length + TILE - 1) // TILE) * TILE
        self.scores = named("scores", T.alloc_buffer((rows, isa.lanes), "float32"))
        self.every = T.ramp(0, 1, isa.lanes)

    def attend(self, is_first: Any, start: Any, length: Any) -> None:
        """Attend to the keys of one request; ``is_first`` if it is the first that the tile overlaps."""
        first = named("first_key_tile", T.Bind(start // TILE))
        tiles = named("key_tiles", T.Bind((start + length + (TILE - 1)) // TILE - first))
        lead = named("lead", T.Bind(start - first * TILE))  # keys of the first tile that are another request's
        self._scores(first, tiles)
        total = self._probabilities(lead, length)
        self._context(start, (lead, length), total, self._store(is_first, start, length))

    def _scores(self, first: Any, tiles: Any) -> None:
        """Rows of scores, counted from the first key of the first tile."""
        isa, count = self.isa, self.knobs.accumulators
        at = lanes_of(self.part, isa)
        with T.serial(tiles) as t, T.serial(TILE // count) as block:
            sums = _zeros(count, isa)
            with T.serial(self.spec.head_size) as c:
                x = T.Bind(self.qkv[self.tile, self.q + c, at])
                for i, s in enumerate(sums):
                    key = splat(self.qkv[first + t, self.k + c, block * count + i], isa.lanes)
                    T.buffer_store(s, fma(x, key, s[0]), [0])
            for i, s in enumerate(sums):
                T.buffer_store(self.scores, s[0], [t * TILE + block * count + i, self.every])

    def _probabilities(self, lead: Any, length: Any) -> Any:
        """Replace scores by exponentials; returns the reciprocal of their sum per query."""
        lanes = self.isa.lanes
        highest, total = self.isa.register("float32"), self.isa.register("float32")
        T.buffer_store(highest, self.scores[lead, self.every], [0])
        with T.serial(length) as i:
            T.buffer_store(highest, T.max(highest[0], self.scores[lead + i, self.every]), [0])
        most = T.Bind(highest[0])
        factor = self.spec.scale * math.log2(math.e)
        T.buffer_store(total, splat(0.0, lanes), [0])
        with T.serial(length) as i:
            difference = T.max(self.scores[lead + i, self.every] - most, splat(_LEAST_EXPONENT / factor, lanes))
            p = T.Bind(exp2_of_product(difference, splat(factor, lanes), 1.0, lanes))
            T.buffer_store(self.scores, p, [lead + i, self.every])
            T.buffer_store(total, total[0] + p, [0])
        return T.Bind(splat(1.0, lanes) / total[0])

    def _context(self, start: Any, keys: tuple[Any, Any], inverse: Any, store: Any) -> None:
        """Multiply the probabilities by the values and hand on rows of the result."""
        lead, length = keys

        def block(channel: Any, count: int) -> None:
            sums = _zeros(count, self.isa)
            with T.serial(length) as i:
                key = T.Bind(start + i)
                p = T.Bind(self.scores[lead + i, self.every])
                for j, s in enumerate(sums):
                    value = self.qkv[key // TILE, self.v + (channel + j), key % TILE]
                    T.buffer_store(s, fma(p, splat(value, self.isa.lanes), s[0]), [0])
            for j, s in enumerate(sums):
                store(channel + j, s[0] * inverse)

        whole, rest = divmod(self.spec.head_size, self.knobs.accumulators)
        with T.serial(whole) as i:
            block(i * self.knobs.accumulators, self.knobs.accumulators)
        if rest:
            block(whole * self.knobs.accumulators, rest)

    def _store(self, is_first: Any, start: Any, length: Any) -> Any:
        """Store a channel of the head: 0 past the request's end; lanes before a later request keep what they have."""
        lanes = self.isa.lanes
        at = lanes_of(self.part, self.isa)
        token = self.tile * TILE + self.part * lanes
        others = T.Bind(lanes_before(token, start, self.isa))
        own = T.Bind(lanes_before(token, start + length, self.isa))

        def store(channel: Any, value: Any) -> None:
            where = [self.tile, self.q + channel, at]
            value = T.Bind(T.reinterpret(f"int32x{lanes}", value) & own)
            with T.If(is_first):
                with T.Then():
                    T.buffer_store(self.out, T.reinterpret(f"float32x{lanes}", value & ~others), where)
                with T.Else():
                    before = T.reinterpret(f"int32x{lanes}", self.out[tuple(where)])
                    T.buffer_store(self.out, T.reinterpret(f"float32x{lanes}", blend(others, before, value)), where)

        return store


def _zeros(count: int, isa: Isa) -> list[Any]:
    registers = [isa.register("float32") for _ in range(count)]
    for register in registers:
        T.buffer_store(register, splat(0.0, isa.lanes), [0])
    return registers
