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
from whet.schedules.segments import (
    Queries,
    Request,
    Vector,
    blend,
    for_each_request,
    for_each_vector,
    lanes_before,
)
from whet.schedules.vector_math import exp2_of_products

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_LEAST_EXPONENT = -200.0
"""2^-200 is 0 in float32, so smaller scores need no telling apart."""

_ROWS = 4
"""Keys whose exponentials are computed together."""


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
                kernel = _Kernel(spec, isa, knobs, qkv, out)
                for_each_request(
                    spec.heads,
                    knobs.unit,
                    segments,
                    tiles,
                    kernel.allocate,
                    kernel.attend,
                    first_only=spec.first_only,
                )
        return builder.get()


class _Kernel:
    """The attention of a few vectors of queries of one head to the keys of one request."""

    def __init__(self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, qkv: Any, out: Any) -> None:
        self.spec, self.isa, self.knobs = spec, isa, knobs
        self.qkv, self.out = qkv, out
        self.every = T.ramp(0, 1, isa.lanes)

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs."""
        rows = -(-(self.spec.max_length + TILE - 1) // TILE) * TILE
        self.scores = named("scores", T.alloc_buffer((self.knobs.queries, rows, self.isa.lanes), "float32"))

    def attend(self, queries: Queries) -> None:
        """Emit everything; scores and probabilities are counted from the first key of the request's first tile."""

        def together(vectors: list[Vector]) -> None:
            self._scores(queries, vectors)
            totals = self._exponentials(queries.request, len(vectors))
            self._context(queries, vectors, totals)

        for_each_vector(self.isa, self.knobs.queries, queries, together)

    def _channel(self, of: str, queries: Queries) -> Any:
        """First of the head's channels of q, k or v."""
        return T.Bind((queries.head + "qkv".index(of) * self.spec.heads) * self.spec.head_size)

    def _scores(self, queries: Queries, vectors: list[Vector]) -> None:
        isa, request = self.isa, queries.request
        count = self.knobs.accumulators // self.knobs.queries
        q, k = self._channel("q", queries), self._channel("k", queries)
        with T.serial(request.tiles) as t, T.serial(TILE // count) as block:
            sums = [self._zeros(len(vectors)) for _ in range(count)]
            with T.serial(self.spec.head_size) as c:
                x = [T.Bind(self.qkv[tile, q + c, lanes_of(part, isa)]) for tile, part in vectors]
                for i, of_key in enumerate(sums):
                    key = T.Bind(splat(self.qkv[request.first + t, k + c, block * count + i], isa.lanes))
                    for s, of_query in zip(of_key, x, strict=True):
                        T.buffer_store(s, fma(of_query, key, s[0]), [0])
            for i, of_key in enumerate(sums):
                for j, s in enumerate(of_key):
                    T.buffer_store(self.scores, s[0], [j, t * TILE + block * count + i, self.every])

    def _exponentials(self, request: Request, vectors: int) -> list[Any]:
        """Replace scores by exponentials, the highest of which is 1; returns their sums per query."""
        lanes = self.isa.lanes
        factor = self.spec.scale * math.log2(math.e)
        most = [self._maximum(j, request) for j in range(vectors)]
        totals = self._zeros(len(most))

        def rows_from(row: Any, count: int) -> None:
            rows = [(j, row + n) for j in range(len(most)) for n in range(count)]
            least = splat(_LEAST_EXPONENT / factor, lanes)
            differences = [T.Bind(T.max(self.scores[j, r, self.every] - most[j], least)) for j, r in rows]
            ps = exp2_of_products(differences, splat(factor, lanes), 1.0, lanes)
            for (j, r), p in zip(rows, ps, strict=True):
                T.buffer_store(self.scores, p, [j, r, self.every])
                T.buffer_store(totals[j], totals[j][0] + p, [0])

        with T.serial(request.length // _ROWS) as i:
            rows_from(T.Bind(request.lead + i * _ROWS), _ROWS)
        rest = T.Bind(request.length % _ROWS)
        with T.serial(rest) as i:
            rows_from(T.Bind(request.end - rest + i), 1)
        return [T.Bind(total[0]) for total in totals]

    def _maximum(self, query: int, request: Request) -> Any:
        highest = self.isa.register("float32")
        T.buffer_store(highest, self.scores[query, request.lead, self.every], [0])
        with T.serial(request.length) as i:
            T.buffer_store(highest, T.max(highest[0], self.scores[query, request.lead + i, self.every]), [0])
        return T.Bind(highest[0])

    def _context(self, queries: Queries, vectors: list[Vector], totals: list[Any]) -> None:
        """Multiply the exponentials by the values and store rows of the result."""
        isa, request = self.isa, queries.request
        v = self._channel("v", queries)
        inverses = [T.Bind(splat(1.0, isa.lanes) / total) for total in totals]
        stores = [self._store(vector, self._channel("q", queries), request) for vector in vectors]

        def block(channel: Any, count: int) -> None:
            sums = [self._zeros(len(totals)) for _ in range(count)]
            with T.serial(request.length) as i:
                key = T.Bind(request.start + i)
                p = [T.Bind(self.scores[j, request.lead + i, self.every]) for j in range(len(totals))]
                for n, of_channel in enumerate(sums):
                    value = T.Bind(splat(self.qkv[key // TILE, v + (channel + n), key % TILE], isa.lanes))
                    for s, of_query in zip(of_channel, p, strict=True):
                        T.buffer_store(s, fma(of_query, value, s[0]), [0])
            for n, of_channel in enumerate(sums):
                for s, inverse, store in zip(of_channel, inverses, stores, strict=True):
                    store(channel + n, s[0] * inverse)

        count = self.knobs.accumulators // self.knobs.queries
        whole, rest = divmod(self.spec.head_size, count)
        with T.serial(whole) as i:
            block(i * count, count)
        if rest:
            block(whole * count, rest)

    def _store(self, vector: Vector, first_channel: Any, request: Request) -> Any:
        """Store a channel of the head: 0 past the request's end; lanes before a later request keep what they have."""
        tile, part = vector
        lanes = self.isa.lanes
        at = lanes_of(part, self.isa)
        token = tile * TILE + part * lanes
        others = T.Bind(lanes_before(token, request.start, self.isa))
        own = T.Bind(lanes_before(token, request.start + request.length, self.isa))
        is_first = T.Bind(request.is_first_of(tile))

        def store(channel: Any, value: Any) -> None:
            where = [tile, first_channel + channel, at]
            value = T.Bind(T.reinterpret(f"int32x{lanes}", value) & own)
            with T.If(is_first):
                with T.Then():
                    T.buffer_store(self.out, T.reinterpret(f"float32x{lanes}", value & ~others), where)
                with T.Else():
                    before = T.reinterpret(f"int32x{lanes}", self.out[tuple(where)])
                    T.buffer_store(self.out, T.reinterpret(f"float32x{lanes}", blend(others, before, value)), where)

        return store

    def _zeros(self, count: int) -> list[Any]:
        registers = [self.isa.register("float32") for _ in range(count)]
        for register in registers:
            T.buffer_store(register, splat(0.0, self.isa.lanes), [0])
        return registers
