"""Attention with integer products: u8 queries × s8 keys, u8 probabilities × s8 values.

Queries are the lanes. A key's four bytes are broadcast against 16 queries × 4 channels, so scores come out transposed,
one row of 16 queries per key; maximum, sum and exponential need no horizontal step, and four rows of probabilities,
rounded to u8, pack into the left operand of the second product. The integers do not depend on where in a tile a
request starts: neither do the bytes of the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.attention_arguments import Arguments, most_tiles
from whet.schedules.attention_softmax import SCORE_ZERO, Softmax, sum_of_quads
from whet.schedules.elementwise import QUAD, lanes_of
from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat
from whet.schedules.segments import Queries, Vector, for_each_request, for_each_vector

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec


def attention_i8(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``i8`` specification."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention_i8")
            arguments = Arguments.declare(spec)
            with T.sblock("root"):
                T.reads()
                T.writes()
                kernel = VectorKernel(spec, isa, knobs, arguments.viewed())
                for_each_request(
                    spec.heads,
                    knobs.unit,
                    arguments.segments,
                    arguments.tiles,
                    kernel.allocate,
                    kernel.attend,
                    shared=True,
                )
        return builder.get()


class VectorKernel:
    """The attention of some queries of one head to the keys of one request."""

    def __init__(self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments) -> None:
        self.spec, self.isa, self.knobs, self.arguments = spec, isa, knobs, arguments
        self.quads = spec.head_size // QUAD
        self.every = T.ramp(0, 1, isa.lanes)

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs; rows are the request's."""
        rows = most_tiles(self.spec.max_length) * TILE
        self.scores = named("scores", T.alloc_buffer((self.knobs.queries, rows, self.isa.lanes), "int32"))
        self.offsets = named("offsets", T.alloc_buffer((rows,), "int32"))

    def attend(self, queries: Queries) -> None:
        """Emit everything."""
        self._offsets(queries)

        def together(vectors: list[Vector]) -> None:
            self._scores(queries, vectors)
            totals = self._probabilities(queries, vectors)
            self._context(queries, vectors, totals)

        for_each_vector(self.isa, self.knobs.queries, queries, together)

    def _offsets(self, queries: Queries) -> None:
        """What each key's scores start from: minus what the queries' zero point 128 adds to them."""
        isa, request = self.isa, queries.request
        x = splat(int.from_bytes(bytes([128] * QUAD), "little", signed=True), isa.lanes, "int32")
        with T.serial(request.tiles) as t, T.serial(isa.parts) as part:
            sums = self._registers(min(QUAD, self.quads))
            for c in range(self.quads):
                s = sums[c % len(sums)]
                key = self.arguments.k[request.first + t, queries.head * self.quads + c, lanes_of(part, isa)]
                T.buffer_store(s, isa.dot4(s[0], x, key), [0])
            total = sum((s[0] for s in sums[1:]), sums[0][0])
            start = splat(SCORE_ZERO, isa.lanes, "int32") - total
            T.buffer_store(self.offsets, start, [T.ramp(t * TILE + part * isa.lanes, 1, isa.lanes)])

    def _scores(self, queries: Queries, vectors: list[Vector]) -> None:
        isa, request = self.isa, queries.request
        count = self.knobs.accumulators // self.knobs.queries
        with T.serial(request.tiles) as t, T.serial(TILE // count) as block:
            row = named("row", T.Bind(t * TILE + block * count))
            sums = [[isa.register("int32") for _ in vectors] for _ in range(count)]
            for i, of_key in enumerate(sums):
                for s in of_key:
                    T.buffer_store(s, splat(self.offsets[row + i], isa.lanes), [0])
            with T.serial(self.quads) as c:
                quad = queries.head * self.quads + c
                x = [T.Bind(self.arguments.q[tile, quad, lanes_of(part, isa)]) for tile, part in vectors]
                for i, of_key in enumerate(sums):
                    key = T.Bind(splat(self.arguments.k[request.first + t, quad, block * count + i], isa.lanes))
                    for s, of_query in zip(of_key, x, strict=True):
                        T.buffer_store(s, isa.dot4(s[0], of_query, key), [0])
            for i, of_key in enumerate(sums):
                for j, s in enumerate(of_key):
                    T.buffer_store(self.scores, s[0], [j, row + i, self.every])

    def _probabilities(self, queries: Queries, vectors: list[Vector]) -> list[Any]:
        """Replace scores by probabilities, four keys to a row; returns their sums per query.

        Row i of the probabilities lies where row i of the scores was, which has been read by then.
        """
        softmax = Softmax(self.scores, queries.request, self.arguments.params[0], self.isa)
        end = softmax.first + softmax.quads
        offsets = []
        for j, (_, part) in enumerate(vectors):
            softmax.hide_others(j, softmax.first * QUAD, end * QUAD)
            if len(vectors) <= self.isa.parts:
                softmax.hide_members(j, part)
            maxima = softmax.maxima()
            with T.serial(softmax.quads) as i:
                softmax.raise_maxima(maxima, j, (softmax.first + i) * QUAD)
            offsets.append(softmax.offset(maxima))
        totals = self._registers(len(vectors))
        with T.serial(softmax.quads) as i:
            quad = named("quad", T.Bind(softmax.first + i))
            packed = [softmax.quad(j, quad, offset) for j, offset in enumerate(offsets)]
            for j, (total, p) in enumerate(zip(totals, packed, strict=True)):
                T.buffer_store(self.scores, p, [j, quad, self.every])
                T.buffer_store(total, sum_of_quads(self.isa, total[0], p), [0])
        return [T.Bind(total[0]) for total in totals]

    def _context(self, queries: Queries, vectors: list[Vector], totals: list[Any]) -> None:
        """Multiply the probabilities by the values and store quads of the result."""
        isa, request = self.isa, queries.request
        stores = [
            self.arguments.context(isa, request, vector, total) for vector, total in zip(vectors, totals, strict=True)
        ]
        first, quads = request.blocks(QUAD)

        def block(channel: Any, count: int) -> None:
            sums = [self._registers(len(vectors)) for _ in range(count)]
            with T.serial(quads) as i:
                quad = T.Bind(first + i)
                p = [T.Bind(self.scores[j, quad, self.every]) for j in range(len(vectors))]
                for n, of_channel in enumerate(sums):
                    value = self.arguments.v[request.first + quad // QUAD, channel + n, quad % QUAD]
                    value = T.Bind(splat(value, isa.lanes))
                    for s, of_query in zip(of_channel, p, strict=True):
                        T.buffer_store(s, isa.dot4(s[0], of_query, value), [0])
            for j, store in enumerate(stores):
                for n in range(0, count, QUAD):
                    store((channel + n) // QUAD, [s[j][0] for s in sums[n : n + QUAD]])

        count = self.knobs.accumulators // self.knobs.queries
        begin = T.Bind(queries.head * self.spec.head_size)
        whole, rest = divmod(self.spec.head_size, count)
        with T.serial(whole) as i:
            block(begin + i * count, count)
        if rest:
            block(begin + whole * count, rest)

    def _registers(self, count: int) -> list[Any]:
        registers = [self.isa.register("int32") for _ in range(count)]
        for register in registers:
            T.buffer_store(register, splat(0, self.isa.lanes, "int32"), [0])
        return registers
