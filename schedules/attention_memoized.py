"""Int8 attention two ways in one kernel: computed, or with probabilities that a record holds from an earlier request.

A *record* has, for each layer, head, tile of 16 queries and quad of keys in turn, a row of 16 words, one of each query;
a word is the quad's four probabilities of 8 bits (see whet.schedules.attention_softmax). It is laid out as if its
request started with a tile; those that use it start anywhere. Every instruction set writes the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules import attention_amx, attention_vector
from whet.schedules.attention import AttentionKnobs, AttentionSpec
from whet.schedules.attention_arguments import Arguments, most_tiles
from whet.schedules.attention_vector import multiply_values, zeros
from whet.schedules.elementwise import QUAD, quantize_rows
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, splat, view
from whet.schedules.segments import Queries, Request, Vector, blend, for_each_vector, lanes_before

USE, KEEP = range(2)
"""The two addresses of a request: of the record it uses, and of the room for the record that is made of it."""

_RECORD_ROWS = 1 << 30
"""Of a buffer over a record, whose size the kernel does not know."""


@dataclass(frozen=True)
class DivideSpec:
    """Those requests of a batch that use a record, or the others.

    Arguments: segments ``(ng, 16, 2)`` int32, records ``(ng, 16, 2)`` int64. Outputs: segments with the other requests'
    entries empty; ``(nt',)`` int8, which is not written and only has a size; live ``(2,)`` int32, the sizes of these
    two: the groups up to the last entry that is not empty, and the tiles up to the end of the requests that use no
    record, or from the start of those that do.
    """

    stored: bool
    """Take the requests that use a record."""


def divide(spec: DivideSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel that divides a batch, serial; the arguments are the specification's, and tokens, ``(nt, 16)`` int32.

    Of the tokens only the number counts.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("divide")
            groups, tiles = named("groups", T.int64()), named("tiles", T.int64())
            parameter("tokens", (tiles, TILE), "int32")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            records = parameter("records", (groups, TILE, 2), "int64")
            kept = parameter("kept", (groups, TILE, 2), "int32")
            parameter("size", (named("left", T.int64()),), "int8")
            live = parameter("live", (2,), "int32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                count, begin, end = (T.alloc_buffer((1,), "int32") for _ in range(3))
                all_tokens = T.Bind(T.cast(tiles * TILE, "int32"))
                for number, value in ((count, T.int32(0)), (begin, all_tokens), (end, T.int32(0))):
                    T.buffer_store(number, value, [0])
                with T.serial(groups * TILE) as entry:
                    at = entry // TILE, entry % TILE
                    start, length = (named(n, T.Bind(segments[(*at, i)])) for i, n in enumerate(("start", "length")))
                    uses = records[(*at, USE)] != T.int64(0)
                    both = (length, T.int32(0)) if spec.stored else (T.int32(0), length)
                    length = T.Bind(T.Select(uses, *both))
                    T.buffer_store(kept, start, [*at, 0])
                    T.buffer_store(kept, length, [*at, 1])
                    with T.If(length > 0), T.Then():
                        T.buffer_store(count, T.cast(entry + 1, "int32"), [0])
                        T.buffer_store(begin, T.min(begin[0], start), [0])
                        T.buffer_store(end, T.max(end[0], start + length), [0])
                T.buffer_store(live, (count[0] + (TILE - 1)) // TILE, [0])
                tiles_left = (all_tokens - begin[0] // TILE * TILE) if spec.stored else end[0] + (TILE - 1)
                T.buffer_store(live, tiles_left // TILE, [1])
        return builder.get()


def memoized_attention(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs | None = None) -> tirx.PrimFunc:
    """Kernel of an ``i8`` specification, parallel over heads.

    Arguments: q, k, v and segments as ``AttentionSpec`` has them, but only of the first tiles and groups, those that
    ``divide`` found for requests that use no record; v of the last tiles, and segments, of those that do; records
    ``(ng, 16, 2)`` int64, addresses or 0, as ``USE`` and ``KEEP`` say; params; layer ``(1,)`` int32, its number within
    a record; out ``(nt, C/4, 16, 4)``. Requests to compute that share a tile have no others between them. A request
    whose record is kept starts with a tile and has its tiles for itself.
    """
    if spec.precision != "i8":
        raise ValueError(f"precision is {spec.precision!r}; records hold the probabilities of i8 attention")
    knobs = knobs or AttentionKnobs.default(spec, isa)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("memoized_attention")
            channels = spec.heads * spec.head_size
            first, last, tiles = (named(n, T.int64()) for n in ("first_tiles", "last_tiles", "tiles"))
            first_groups, last_groups = (named(n, T.int64()) for n in ("first_groups", "last_groups"))
            quads = channels // QUAD, TILE, QUAD
            q = parameter("q", (first, *quads), "uint8")
            k = parameter("k", (first, *quads), "int8")
            v = parameter("v", (first, channels, TILE), "int8")
            computed = parameter("computed", (first_groups, TILE, 2), "int32")
            stored_v = parameter("stored_v", (last, channels, TILE), "int8")
            segments = parameter("stored", (last_groups, TILE, 2), "int32")
            records = parameter("records", (named("groups", T.int64()), TILE, 2), "int64")
            params = parameter("params", (4,), "float32")
            layer = parameter("layer", (1,), "int32")
            out = parameter("out", (tiles, *quads), "uint8")
            with T.sblock("root"):
                T.reads()
                T.writes()
                family = attention_amx if attention_amx.supports(spec, isa) else attention_vector
                stored = _Stored(spec, isa, AttentionKnobs.default(spec, isa), stored_v, records, params, layer, out)
                family.attend(spec, isa, knobs, Arguments(first, q, k, v, computed, params, out), stored.keep)
                with T.parallel(spec.heads) as head, T.If(last_groups > 0), T.Then():
                    stored.allocate()
                    with T.serial(last_groups * TILE) as entry:
                        stored.apply(head, segments, entry)
        return builder.get()


class _Stored:
    """Making and using records."""

    def __init__(
        self,
        spec: AttentionSpec,
        isa: Isa,
        knobs: AttentionKnobs,
        v: Any,
        records: Any,
        params: Any,
        layer: Any,
        out: Any,
    ) -> None:
        self.spec, self.isa, self.knobs = spec, isa, knobs
        self.v, self.records, self.params, self.layer = v, records, params, layer
        self.out = named("out_words", view(out, out.shape[:3], "int32"))
        self.quads = spec.head_size // QUAD
        self.every = T.ramp(0, 1, isa.lanes)

    def allocate(self) -> None:
        """Allocate a head's values and results, a row per channel and per quad of channels.

        The request starts in column 16, after what its first tile holds of others.
        """
        columns = (most_tiles(self.spec.max_length) + 1) * TILE
        self.values = named("values", T.alloc_buffer((self.spec.head_size, columns), "int8"))
        self.results = named("results", T.alloc_buffer((self.quads, columns), "int32"))

    def keep(self, queries: Queries, vector: Vector, first: Any, count: Any, load: Any) -> None:
        """Copy probabilities to the record that is made of the request, if one is."""
        request, (tile, part) = queries.request, vector
        address = T.Bind(self._address(request.entry, KEEP))
        with T.If(address != T.int64(0)), T.Then():
            rows = self._rows(address)
            begin = T.Bind(self._first_row(queries.head, request.length, tile - request.first))
            with T.serial(count) as i:
                quad = T.Bind(first + i)
                T.buffer_store(rows, load(quad), [begin + quad, self._lanes(part)])

    def apply(self, head: Any, segments: Any, entry: Any) -> None:
        """Emit the attention of one head of a request that uses a record."""
        start, length = (T.Bind(segments[entry // TILE, entry % TILE, i]) for i in range(2))
        address = T.Bind(self._address(entry, USE))
        with T.If(length > 0), T.Then():
            request = Request.at(segments, None, entry, start, length)
            self._gather(head, request)
            rows = self._rows(address)
            tiles = T.Bind((length + (TILE - 1)) // TILE)

            def together(vectors: list[Vector]) -> None:
                self._context(head, request, rows, vectors)

            for_each_vector(self.isa, self.knobs.queries, Queries(head, T.int32(0), tiles, request), together)
            self._scatter(head, request)

    def _address(self, entry: Any, which: int) -> Any:
        return self.records[entry // TILE, entry % TILE, which]

    def _rows(self, address: Any) -> Any:
        pointer = T.Bind(T.reinterpret(PointerType(PrimType("int32")), address))
        return T.decl_buffer((_RECORD_ROWS, TILE), "int32", data=pointer)

    def _first_row(self, head: Any, length: Any, tile: Any) -> Any:
        """Row of a record where the probabilities of a tile of queries begin."""
        tiles, quads = ((length + (size - 1)) // size for size in (TILE, QUAD))
        index = (T.cast(self.layer[0], "int64") * self.spec.heads + head) * tiles + tile
        return T.cast(index, "int64") * quads

    def _lanes(self, part: Any) -> Any:
        return T.ramp(part * self.isa.lanes, 1, self.isa.lanes)

    def _gather(self, head: Any, request: Request) -> None:
        """Put the request's values together."""
        before = T.Bind(self.out.shape[0] - self.v.shape[0])
        with T.serial(request.tiles) as t, T.serial(self.spec.head_size) as channel:
            value = self.v[request.first + t - before, head * self.spec.head_size + channel, T.ramp(0, 1, TILE)]
            T.buffer_store(self.values, value, [channel, T.ramp((t + 1) * TILE - request.lead, 1, TILE)])

    def _context(self, head: Any, request: Request, rows: Any, vectors: list[Vector]) -> None:
        """Multiply vectors' probabilities by the values."""
        isa = self.isa
        lanes = isa.lanes
        quads = T.Bind((request.length + (QUAD - 1)) // QUAD)
        begins = [T.Bind(self._first_row(head, request.length, tile)) for tile, _ in vectors]
        values = named(
            "value_words", view(self.values, (*self.values.shape[:1], self.values.shape[1] // QUAD), "int32")
        )

        def probability(j: int, i: Any) -> Any:
            return rows[begins[j] + i, self._lanes(vectors[j][1])]

        totals = zeros(isa, "int32", len(vectors))
        with T.serial(quads) as i:
            for j, total in enumerate(totals):
                ones = splat(0x01010101, lanes, "int32")
                T.buffer_store(total, isa.dot4(total[0], probability(j, i), ones), [0])
        scale, zero = (T.Bind(splat(self.params[i], lanes)) for i in (1, 2))
        inverses = [T.Bind(scale / T.cast(total[0], f"float32x{lanes}")) for total in totals]

        def store(j: int, quad: Any, sums: list[Any]) -> None:
            tile, part = vectors[j]
            result = quantize_rows([T.cast(s, f"float32x{lanes}") for s in sums], inverses[j], zero, isa)
            column = (tile + 1) * TILE + part * lanes
            T.buffer_store(self.results, T.Bind(result), [quad, T.ramp(column, 1, lanes)])

        multiply_values(
            isa,
            self.knobs,
            self.spec.head_size,
            QUAD,
            quads,
            probability,
            lambda channel, i: values[channel, i + TILE // QUAD],
            isa.dot4,
            "int32",
            [partial(store, j) for j in range(len(vectors))],
        )

    def _scatter(self, head: Any, request: Request) -> None:
        """Store the results where the request's tokens are; lanes of others keep theirs."""
        end = T.Bind(request.start + request.length)
        with T.serial(request.tiles) as t, T.serial(self.isa.parts) as part:
            token = T.Bind((request.first + t) * TILE + part * self.isa.lanes)
            own = T.Bind(lanes_before(token, end, self.isa) & ~lanes_before(token, request.start, self.isa))
            column = T.Bind((t + 1) * TILE - request.lead + part * self.isa.lanes)
            with T.serial(self.quads) as quad:
                at = [request.first + t, head * self.quads + quad, self._lanes(part)]
                result = self.results[quad, T.ramp(column, 1, self.isa.lanes)]
                T.buffer_store(self.out, blend(own, result, self.out[tuple(at)]), at)
