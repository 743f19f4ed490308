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
from whet.schedules.segments import blend, entries_of_tiles, for_each_segment, lanes_before
from whet.schedules.vector_math import exp2_of_product

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_EXP_DEGREE = 3
"""Good for 1e-4 of a probability, which is then rounded to 1/255."""


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
                q, k, out = words(q), words(k), words(out)
                v = named("values", view(v, (tiles, channels, TILE // QUAD), "int32"))
                entries = entries_of_tiles(segments, tiles)
                vectors = tiles * isa.parts
                with T.parallel(spec.heads * vectors) as task:
                    head = named("head", T.Bind(task // vectors))
                    tile = named("tile", T.Bind(task % vectors // isa.parts))
                    part = named("part", T.Bind(task % isa.parts))
                    queries = _Queries(spec, isa, knobs, (q, k, v, params, out), (head, tile, part))
                    for_each_segment(entries, segments, tile, queries.attend)
        return builder.get()


class _Queries:
    """The attention of one vector of queries and one head: a unit of parallel work."""

    def __init__(
        self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, buffers: tuple[Any, ...], place: tuple[Any, ...]
    ) -> None:
        self.size = spec.head_size
        self.isa, self.knobs = isa, knobs
        self.q, self.k, self.v, self.params, self.out = buffers
        self.head, self.tile, self.part = place
        rows = -(-(spec.max_length + TILE - 1) // TILE) * TILE
        self.scores = named("scores", T.alloc_buffer((rows, isa.lanes), "int32"))
        self.offsets = named("offsets", T.alloc_buffer((rows,), "int32"))

    def attend(self, is_first: Any, start: Any, length: Any) -> None:
        """Attend to the keys of one request; ``is_first`` if it is the first that the tile overlaps."""
        first = named("first_key_tile", T.Bind(start // TILE))
        tiles = named("key_tiles", T.Bind((start + length + (TILE - 1)) // TILE - first))
        lead = named("lead", T.Bind(start - first * TILE))  # keys of the first tile that are another request's
        self._offsets(first, tiles)
        self._scores(first, tiles)
        total = self._probabilities(lead, length)
        self._context(first, (lead, length), total, self._store(is_first, start))

    def _offsets(self, first: Any, tiles: Any) -> None:
        """What the zero point 128 of the queries adds to each key's scores, negated."""
        isa, quads = self.isa, self.size // QUAD
        x = splat(int.from_bytes(bytes([128] * 4), "little", signed=True), isa.lanes, "int32")
        with T.serial(tiles) as t, T.serial(isa.parts) as part:
            at = lanes_of(part, isa)
            total = isa.register("int32")
            T.buffer_store(total, splat(0, isa.lanes, "int32"), [0])
            with T.serial(quads) as c:
                T.buffer_store(total, isa.dot4(total[0], x, self.k[first + t, self.head * quads + c, at]), [0])
            negated = splat(0, isa.lanes, "int32") - total[0]
            T.buffer_store(self.offsets, negated, [T.ramp(t * TILE + part * isa.lanes, 1, isa.lanes)])

    def _scores(self, first: Any, tiles: Any) -> None:
        """Rows of scores, counted from the first key of the first tile."""
        isa, quads, count = self.isa, self.size // QUAD, self.knobs.accumulators
        at = lanes_of(self.part, isa)
        with T.serial(tiles) as t, T.serial(TILE // count) as block:
            row = named("row", T.Bind(t * TILE + block * count))
            sums = [isa.register("int32") for _ in range(count)]
            for i, s in enumerate(sums):
                T.buffer_store(s, splat(self.offsets[row + i], isa.lanes), [0])
            with T.serial(quads) as c:
                quad = self.head * quads + c
                x = T.Bind(self.q[self.tile, quad, at])
                for i, s in enumerate(sums):
                    key = splat(self.k[first + t, quad, block * count + i], isa.lanes)
                    T.buffer_store(s, isa.dot4(s[0], x, key), [0])
            for i, s in enumerate(sums):
                T.buffer_store(self.scores, s[0], [row + i, T.ramp(0, 1, isa.lanes)])

    def _probabilities(self, lead: Any, length: Any) -> Any:
        """Replace scores by probabilities, four keys to a row; returns their sum per query.

        Row i of the probabilities lies where row i of the scores was, which has been read by then.
        """
        isa, lanes = self.isa, self.isa.lanes
        every = T.ramp(0, 1, lanes)
        most = self._maximum(lead, length)
        scale = T.Bind(splat(self.params[0], lanes) * splat(math.log2(math.e), lanes))
        total = isa.register("int32")
        T.buffer_store(total, splat(0, lanes, "int32"), [0])
        first = named("first_quad", T.Bind(lead // QUAD))
        # Keys of other requests in the first and last quad: anything that does not spill out of its byte; masked below.
        with T.serial(lead - first * QUAD) as i:
            T.buffer_store(self.scores, most, [first * QUAD + i, every])
        with T.serial(-(lead + length) % QUAD) as i:
            T.buffer_store(self.scores, most, [lead + length + i, every])
        with T.serial((lead + length + (QUAD - 1)) // QUAD - first) as i:
            quad = named("quad", T.Bind(first + i))
            rows = []
            for j in range(QUAD):
                difference = T.cast(self.scores[quad * QUAD + j, every] - most, f"float32x{lanes}")
                p = exp2_of_product(difference, scale, 255.0, lanes, _EXP_DEGREE)
                rows.append(T.Bind(round_int(p, lanes)))
            packed = T.Bind(pack4(rows, lanes) & splat(_inside(lead - quad * QUAD, lead + length - quad * QUAD), lanes))
            T.buffer_store(self.scores, packed, [quad, every])
            ones = splat(0x01010101, lanes, "int32")
            T.buffer_store(total, isa.dot4(total[0], packed, ones), [0])
        return T.Bind(total[0])

    def _maximum(self, lead: Any, length: Any) -> Any:
        lanes = self.isa.lanes
        every = T.ramp(0, 1, lanes)
        chains = [self.isa.register("int32") for _ in range(QUAD)]
        for m in chains:
            T.buffer_store(m, self.scores[lead, every], [0])
        with T.serial(length // QUAD) as i:
            for j, m in enumerate(chains):
                T.buffer_store(m, T.max(m[0], self.scores[lead + i * QUAD + j, every]), [0])
        with T.serial(length % QUAD) as i:
            row = lead + length // QUAD * QUAD + i
            T.buffer_store(chains[0], T.max(chains[0][0], self.scores[row, every]), [0])
        a, b, c, d = (m[0] for m in chains)
        return T.Bind(T.max(T.max(a, b), T.max(c, d)))

    def _context(self, first: Any, keys: tuple[Any, Any], total: Any, store: Any) -> None:
        """Multiply the probabilities by the values and hand on quads of the result."""
        isa, lanes = self.isa, self.isa.lanes
        lead, length = keys
        inverse = T.Bind(splat(self.params[1], lanes) / T.cast(total, f"float32x{lanes}"))
        zero = T.Bind(splat(self.params[2], lanes))
        first_quad = T.Bind(lead // QUAD)
        quads = T.Bind((lead + length + (QUAD - 1)) // QUAD - first_quad)

        def block(channel: Any, count: int) -> None:
            sums = [isa.register("int32") for _ in range(count)]
            for s in sums:
                T.buffer_store(s, splat(0, lanes, "int32"), [0])
            with T.serial(quads) as i:
                quad = T.Bind(first_quad + i)
                p = T.Bind(self.scores[quad, T.ramp(0, 1, lanes)])
                for j, s in enumerate(sums):
                    value = self.v[first + quad // QUAD, channel + j, quad % QUAD]
                    T.buffer_store(s, isa.dot4(s[0], p, splat(value, lanes)), [0])
            for j in range(0, count, QUAD):
                rows = [T.cast(s[0], f"float32x{lanes}") for s in sums[j : j + QUAD]]
                store(channel // QUAD + j // QUAD, quantize_rows(rows, inverse, zero, isa))

        begin = T.Bind(self.head * self.size)
        whole, rest = divmod(self.size, self.knobs.accumulators)
        with T.serial(whole) as i:
            block(begin + i * self.knobs.accumulators, self.knobs.accumulators)
        if rest:
            block(begin + whole * self.knobs.accumulators, rest)

    def _store(self, is_first: Any, start: Any) -> Any:
        """Store quads: of all lanes, but those before a request that is not the tile's first keep what they have.

        Requests come in ascending order, so what is written past a request's end is overwritten.
        """
        at = lanes_of(self.part, self.isa)
        others = T.Bind(lanes_before(self.tile * TILE + self.part * self.isa.lanes, start, self.isa))

        def store(quad: Any, value: Any) -> None:
            value = T.Bind(value)
            with T.If(is_first):
                with T.Then():
                    T.buffer_store(self.out, value, [self.tile, quad, at])
                with T.Else():
                    T.buffer_store(self.out, blend(others, self.out[self.tile, quad, at], value), [self.tile, quad, at])

        return store


def _inside(low: Any, high: Any) -> Any:
    """int32 whose byte i is all ones if low ≤ i < high, for low < 4 and high > 0."""
    ones = T.uint32(0xFFFFFFFF)
    from_low = T.shift_left(ones, T.cast(T.max(low, 0) * 8, "uint32"))
    below_high = T.shift_right(ones, T.cast((QUAD - T.min(high, QUAD)) * 8, "uint32"))
    return T.reinterpret("int32", from_low & below_high)
