"""Attention with integer products: u8 queries × s8 keys, u8 probabilities × s8 values.

Queries are the lanes. A key's four bytes are broadcast against 16 queries × 4 channels, so scores come out transposed,
one row of 16 queries per key; maximum, sum and exponential need no horizontal step, and four rows of probabilities,
rounded to u8, pack into the left operand of the second product without a shuffle. The integers do not depend on where
in a tile a request starts: neither do the bytes of the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import QUAD, lanes_of, quantize_rows, words
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, pack4, round_int, splat, view
from whet.schedules.segments import Queries, Request, blend, for_each_request, lanes_before
from whet.schedules.vector_math import exp2_of_products

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_EXP_DEGREE = 3
"""Good for 1e-4 of a probability, which is then rounded to 1/255."""

_FLOAT_ZERO = 0x4B400000
"""The bits of 1.5·2²³. An integer s added to them makes the bits of 1.5·2²³ + s, so scores that start here are floats
without a conversion, as long as |s| < 2²²."""

MAX_HEAD_SIZE = 256
"""Largest head whose scores, at most 128 · 127 a channel, stay below 2²²."""


def attention_i8(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``i8`` specification."""
    channels = spec.heads * spec.head_size
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention_i8")
            tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
            q = parameter("q", (tiles, channels // QUAD, TILE, QUAD), "uint8")
            k = parameter("k", (tiles, channels // QUAD, TILE, QUAD), "int8")
            v = parameter("v", (tiles, channels, TILE), "int8")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            params = parameter("params", (4,), "float32")
            out = parameter("out", (tiles, channels // QUAD, TILE, QUAD), "uint8")
            with T.sblock("root"):
                T.reads()
                T.writes()
                v = named("values", view(v, (tiles, channels, TILE // QUAD), "int32"))
                kernel = _Kernel(spec, isa, knobs, (words(q), words(k), v, params, words(out)))
                for_each_request(isa, spec.heads, knobs.queries, segments, tiles, kernel.allocate, kernel.attend)
        return builder.get()


class _Kernel:
    """The attention of a few vectors of queries of one head to the keys of one request."""

    def __init__(self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, buffers: tuple[Any, ...]) -> None:
        self.size, self.max_length = spec.head_size, spec.max_length
        self.isa, self.knobs = isa, knobs
        self.q, self.k, self.v, self.params, self.out = buffers
        self.every = T.ramp(0, 1, isa.lanes)

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs."""
        rows = -(-(self.max_length + TILE - 1) // TILE) * TILE
        self.scores = named("scores", T.alloc_buffer((self.knobs.queries, rows, self.isa.lanes), "int32"))
        self.offsets = named("offsets", T.alloc_buffer((rows,), "int32"))

    def attend(self, queries: Queries, request: Request) -> None:
        """Emit everything; scores and probabilities are counted from the first key of the request's first tile."""
        self._offsets(queries, request)
        self._scores(queries, request)
        totals = self._probabilities(queries, request)
        self._context(queries, request, totals)

    def _offsets(self, queries: Queries, request: Request) -> None:
        """What each key's scores start from: minus what the queries' zero point 128 adds to them."""
        isa, quads = self.isa, self.size // QUAD
        x = splat(int.from_bytes(bytes([128] * QUAD), "little", signed=True), isa.lanes, "int32")
        with T.serial(request.tiles) as t, T.serial(isa.parts) as part:
            sums = self._registers(min(QUAD, quads), 0)
            for c in range(quads):
                s = sums[c % len(sums)]
                key = self.k[request.first + t, queries.head * quads + c, lanes_of(part, isa)]
                T.buffer_store(s, isa.dot4(s[0], x, key), [0])
            total = sum((s[0] for s in sums[1:]), sums[0][0])
            start = splat(_FLOAT_ZERO, isa.lanes, "int32") - total
            T.buffer_store(self.offsets, start, [T.ramp(t * TILE + part * isa.lanes, 1, isa.lanes)])

    def _scores(self, queries: Queries, request: Request) -> None:
        isa, quads = self.isa, self.size // QUAD
        count = self.knobs.accumulators // self.knobs.queries
        with T.serial(request.tiles) as t, T.serial(TILE // count) as block:
            row = named("row", T.Bind(t * TILE + block * count))
            sums = [[isa.register("int32") for _ in queries.vectors] for _ in range(count)]
            for i, of_key in enumerate(sums):
                for s in of_key:
                    T.buffer_store(s, splat(self.offsets[row + i], isa.lanes), [0])
            with T.serial(quads) as c:
                quad = queries.head * quads + c
                x = [T.Bind(self.q[tile, quad, lanes_of(part, isa)]) for tile, part in queries.vectors]
                for i, of_key in enumerate(sums):
                    key = T.Bind(splat(self.k[request.first + t, quad, block * count + i], isa.lanes))
                    for s, of_query in zip(of_key, x, strict=True):
                        T.buffer_store(s, isa.dot4(s[0], of_query, key), [0])
            for i, of_key in enumerate(sums):
                for j, s in enumerate(of_key):
                    T.buffer_store(self.scores, s[0], [j, row + i, self.every])

    def _probabilities(self, queries: Queries, request: Request) -> list[Any]:
        """Replace scores by probabilities, four keys to a row; returns their sums per query.

        Row i of the probabilities lies where row i of the scores was, which has been read by then.
        """
        isa, lanes = self.isa, self.isa.lanes
        scale = T.Bind(splat(self.params[0], lanes) * splat(math.log2(math.e), lanes))
        first, quads = request.blocks(QUAD)
        most = [self._maximum(j, request) for j in range(len(queries.vectors))]
        # Keys of other requests in the first and last quad count as 255 first, and are taken out below.
        for j, m in enumerate(most):
            bits = T.reinterpret(f"int32x{lanes}", m)
            with T.serial(request.lead - first * QUAD) as i:
                T.buffer_store(self.scores, bits, [j, first * QUAD + i, self.every])
            with T.serial((first + quads) * QUAD - request.end) as i:
                T.buffer_store(self.scores, bits, [j, request.end + i, self.every])
        totals = self._registers(len(most), 0)
        with T.serial(quads) as i:
            quad = named("quad", T.Bind(first + i))
            rows = [(j, quad * QUAD + n) for j in range(len(most)) for n in range(QUAD)]
            differences = [T.Bind(self._score(j, row) - most[j]) for j, row in rows]
            p = exp2_of_products(differences, scale, 255.0, lanes, _EXP_DEGREE)
            rounded = [T.Bind(round_int(x, lanes)) for x in p]
            for j, total in enumerate(totals):
                packed = T.Bind(pack4(rounded[j * QUAD : (j + 1) * QUAD], lanes))
                T.buffer_store(self.scores, packed, [j, quad, self.every])
                T.buffer_store(total, isa.dot4(total[0], packed, splat(0x01010101, lanes, "int32")), [0])
        last = T.Bind(first + quads - 1)
        masks = [(first, _bytes_from(request.lead - first * QUAD)), (last, _bytes_below(request.end - last * QUAD))]
        for j in range(len(most)):
            for quad, mask in masks:
                T.buffer_store(
                    self.scores, self.scores[j, quad, self.every] & splat(mask, lanes), [j, quad, self.every]
                )
        excess = T.Bind((quads * QUAD - request.length) * 255)
        return [T.Bind(total[0] - splat(excess, lanes)) for total in totals]

    def _score(self, query: int, row: Any) -> Any:
        return T.reinterpret(f"float32x{self.isa.lanes}", self.scores[query, row, self.every])

    def _maximum(self, query: int, request: Request) -> Any:
        chains = [self.isa.register("float32") for _ in range(QUAD)]
        for m in chains:
            T.buffer_store(m, self._score(query, request.lead), [0])
        with T.serial(request.length // QUAD) as i:
            for j, m in enumerate(chains):
                T.buffer_store(m, T.max(m[0], self._score(query, request.lead + i * QUAD + j)), [0])
        with T.serial(request.length % QUAD) as i:
            T.buffer_store(chains[0], T.max(chains[0][0], self._score(query, request.end - 1 - i)), [0])
        a, b, c, d = (m[0] for m in chains)
        return T.Bind(T.max(T.max(a, b), T.max(c, d)))

    def _context(self, queries: Queries, request: Request, totals: list[Any]) -> None:
        """Multiply the probabilities by the values and store quads of the result."""
        isa, lanes = self.isa, self.isa.lanes
        one = splat(self.params[1], lanes)
        inverses = [T.Bind(one / T.cast(total, f"float32x{lanes}")) for total in totals]
        zero = T.Bind(splat(self.params[2], lanes))
        first, quads = request.blocks(QUAD)
        stores = [self._store(vector, request) for vector in queries.vectors]

        def block(channel: Any, count: int) -> None:
            sums = [self._registers(len(inverses), 0) for _ in range(count)]
            with T.serial(quads) as i:
                quad = T.Bind(first + i)
                p = [T.Bind(self.scores[j, quad, self.every]) for j in range(len(inverses))]
                for n, of_channel in enumerate(sums):
                    value = self.v[request.first + quad // QUAD, channel + n, quad % QUAD]
                    value = T.Bind(splat(value, lanes))
                    for s, of_query in zip(of_channel, p, strict=True):
                        T.buffer_store(s, isa.dot4(s[0], of_query, value), [0])
            for j, (inverse, store) in enumerate(zip(inverses, stores, strict=True)):
                for n in range(0, count, QUAD):
                    rows = [T.cast(s[j][0], f"float32x{lanes}") for s in sums[n : n + QUAD]]
                    store((channel + n) // QUAD, quantize_rows(rows, inverse, zero, isa))

        count = self.knobs.accumulators // self.knobs.queries
        begin = T.Bind(queries.head * self.size)
        whole, rest = divmod(self.size, count)
        with T.serial(whole) as i:
            block(begin + i * count, count)
        if rest:
            block(begin + whole * count, rest)

    def _store(self, vector: tuple[Any, Any], request: Request) -> Any:
        """Store quads: of all lanes, but those before a request that is not the tile's first keep what they have.

        Requests come in ascending order, so what is written past a request's end is overwritten.
        """
        tile, part = vector
        at = lanes_of(part, self.isa)
        others = T.Bind(lanes_before(tile * TILE + part * self.isa.lanes, request.start, self.isa))
        is_first = T.Bind(request.is_first_of(tile))

        def store(quad: Any, value: Any) -> None:
            value = T.Bind(value)
            with T.If(is_first):
                with T.Then():
                    T.buffer_store(self.out, value, [tile, quad, at])
                with T.Else():
                    T.buffer_store(self.out, blend(others, self.out[tile, quad, at], value), [tile, quad, at])

        return store

    def _registers(self, count: int, value: int) -> list[Any]:
        registers = [self.isa.register("int32") for _ in range(count)]
        for register in registers:
            T.buffer_store(register, splat(value, self.isa.lanes, "int32"), [0])
        return registers


def _bytes_from(low: Any) -> Any:
    """int32 whose bytes from the low-th on are all ones, 0 ≤ low < 4."""
    return T.shift_left(T.int32(-1), T.cast(low * 8, "int32"))


def _bytes_below(high: Any) -> Any:
    """int32 whose bytes below the high-th are all ones, 0 < high ≤ 4."""
    ones = T.shift_right(T.uint32(0xFFFFFFFF), T.cast((QUAD - high) * 8, "uint32"))
    return T.reinterpret("int32", ones)
