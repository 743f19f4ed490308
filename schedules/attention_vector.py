"""Attention with products of words: u8 queries and probabilities × s8 keys and values, or all bfloat16.

Queries are the lanes. A key's word of channels is broadcast against that of 16 queries, so scores come out transposed,
one row of 16 queries per key; maximum, sum and exponential need no horizontal step, and rows of probabilities, rounded,
pack into the left operand of the second product. Integers do not depend on where in a tile a request starts, and
floats are added from its first key on: neither do the bytes of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.attention_arguments import Arguments, Keep, most_tiles
from whet.schedules.attention_softmax import SCORE_ZERO, ByteSoftmax, PairSoftmax, Softmax
from whet.schedules.elementwise import QUAD, lanes_of
from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat, view
from whet.schedules.segments import Queries, Vector, for_each_request, for_each_vector

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec


def attention_vector(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``i8`` or ``bf16`` specification."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(f"attention_{spec.precision}")
            arguments = Arguments.declare(spec)
            with T.sblock("root"):
                T.reads()
                T.writes()
                attend(spec, isa, knobs, arguments)
        return builder.get()


def attend(
    spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments, keep: Keep | None = None
) -> None:
    """Emit the attention of all requests of the arguments; ``keep`` is given the probabilities."""
    kind = ByteKernel if spec.precision == "i8" else PairKernel
    kernel = kind(spec, isa, knobs, arguments.viewed(), keep)
    for_each_request(
        spec.heads,
        knobs.unit,
        arguments.segments,
        arguments.tiles,
        kernel.allocate,
        kernel.attend,
        shared=kernel.shared,
        first_only=spec.first_only,
    )


class VectorKernel:
    """The attention of some queries of one head to the keys of one request."""

    in_word: int
    """Channels of a word of queries and keys, keys of a word of probabilities and values."""
    dtype: str
    """Of sums of products."""
    shared: bool
    """Whether requests within one tile are attended together."""

    def __init__(
        self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments, keep: Keep | None = None
    ) -> None:
        self.spec, self.isa, self.knobs, self.arguments, self.keep = spec, isa, knobs, arguments, keep
        self.words = spec.head_size // self.in_word
        self.every = T.ramp(0, 1, isa.lanes)

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs; rows are the request's."""
        rows = most_tiles(self.spec.max_length) * TILE + QUAD
        self.scores = named("scores", T.alloc_buffer((self.knobs.queries, rows, self.isa.lanes), "int32"))

    def attend(self, queries: Queries) -> None:
        """Emit everything."""
        with self.isa.definitions():
            self._prepare(queries)

            def together(vectors: list[Vector]) -> None:
                self._scores(queries, vectors)
                softmax = self._softmax(queries)
                totals = self._probabilities(softmax, vectors)
                if self.keep is not None:
                    for j, vector in enumerate(vectors):
                        self.keep(queries, vector, softmax.first, softmax.quads, partial(self._row, j))
                self._context(queries, softmax, vectors, totals)

            for_each_vector(self.isa, self.knobs.queries, queries, together)

    def _prepare(self, queries: Queries) -> None:
        """Compute what serves all of the queries."""
        raise NotImplementedError

    def _start(self, row: Any) -> Any:
        """What the scores of a key start from."""
        raise NotImplementedError

    def _product(self, total: Any, x: Any, y: Any) -> Any:
        raise NotImplementedError

    def _softmax(self, queries: Queries) -> Softmax:
        raise NotImplementedError

    def _value(self, queries: Queries, channel: Any, word: Any) -> Any:
        """Values of a channel of the head for the keys of a word of probabilities."""
        raise NotImplementedError

    def _scores(self, queries: Queries, vectors: list[Vector]) -> None:
        isa, request = self.isa, queries.request
        count = self.knobs.accumulators // self.knobs.queries
        with T.serial(request.tiles) as t, T.serial(TILE // count) as block:
            row = named("row", T.Bind(t * TILE + block * count))
            sums = [[isa.register(self.dtype) for _ in vectors] for _ in range(count)]
            for i, of_key in enumerate(sums):
                for s in of_key:
                    T.buffer_store(s, self._start(row + i), [0])
            with T.serial(self.words) as c:
                word = queries.head * self.words + c
                x = [T.Bind(self.arguments.q[tile, word, lanes_of(part, isa)]) for tile, part in vectors]
                for i, of_key in enumerate(sums):
                    key = T.Bind(splat(self.arguments.k[request.first + t, word, block * count + i], isa.lanes))
                    for s, of_query in zip(of_key, x, strict=True):
                        T.buffer_store(s, self._product(s[0], of_query, key), [0])
            for i, of_key in enumerate(sums):
                for j, s in enumerate(of_key):
                    bits = s[0] if self.dtype == "int32" else T.reinterpret(f"int32x{isa.lanes}", s[0])
                    T.buffer_store(self.scores, bits, [j, row + i, self.every])

    def _row(self, vector: int, word: Any) -> Any:
        """A word of a vector's probabilities."""
        return self.scores[vector, word, self.every]

    def _probabilities(self, softmax: Softmax, vectors: list[Vector]) -> list[Any]:
        """Replace scores by words of probabilities; returns their sums per query.

        They lie where rows of scores were that have been read by then.
        """
        end = softmax.first + softmax.quads
        offsets = []
        for j, (_, part) in enumerate(vectors):
            softmax.hide_others(j, softmax.row(softmax.first), softmax.row(end))
            if self.shared and len(vectors) <= self.isa.parts:
                softmax.hide_members(j, part)
            maxima = softmax.maxima()
            with T.serial(softmax.quads) as i:
                softmax.raise_maxima(maxima, j, softmax.row(softmax.first + i))
            offsets.append(softmax.offset(maxima))
        totals = zeros(self.isa, softmax.dtype, len(vectors))
        with T.serial(softmax.quads) as i:
            quad = named("quad", T.Bind(softmax.first + i))
            packed = [softmax.quad(j, quad, offset) for j, offset in enumerate(offsets)]
            for j, (total, words) in enumerate(zip(totals, packed, strict=True)):
                for w, p in enumerate(words):
                    T.buffer_store(self.scores, p, [j, quad * softmax.words + w, self.every])
                    T.buffer_store(total, softmax.added(total[0], p), [0])
        return [T.Bind(total[0]) for total in totals]

    def _context(self, queries: Queries, softmax: Softmax, vectors: list[Vector], totals: list[Any]) -> None:
        """Multiply the probabilities by the values and store words of the result."""
        isa, request = self.isa, queries.request
        stores = [
            self.arguments.context(isa, request, vector, total) for vector, total in zip(vectors, totals, strict=True)
        ]
        begin = T.Bind(queries.head * self.words)

        multiply_values(
            isa,
            self.knobs,
            self.spec.head_size,
            self.in_word,
            T.Bind(softmax.quads * softmax.words),
            lambda j, i: self._row(j, softmax.first * softmax.words + i),
            lambda channel, i: self._value(queries, channel, softmax.first * softmax.words + i),
            self._product,
            self.dtype,
            [partial(_store_at, store, begin) for store in stores],
        )


class ByteKernel(VectorKernel):
    """u8 × s8, in int32: exact."""

    in_word = QUAD
    dtype = "int32"
    shared = True

    def allocate(self) -> None:  # noqa: D102
        super().allocate()
        rows = most_tiles(self.spec.max_length) * TILE
        self.offsets = named("offsets", T.alloc_buffer((rows,), "int32"))

    def _prepare(self, queries: Queries) -> None:
        """Compute from what each key's scores start: minus what the queries' zero point 128 adds to them."""
        isa, request = self.isa, queries.request
        x = splat(int.from_bytes(bytes([128] * QUAD), "little", signed=True), isa.lanes, "int32")
        with T.serial(request.tiles) as t, T.serial(isa.parts) as part:
            sums = zeros(isa, self.dtype, min(QUAD, self.words))
            for c in range(self.words):
                s = sums[c % len(sums)]
                key = self.arguments.k[request.first + t, queries.head * self.words + c, lanes_of(part, isa)]
                T.buffer_store(s, isa.dot4(s[0], x, key), [0])
            total = sum((s[0] for s in sums[1:]), sums[0][0])
            start = splat(SCORE_ZERO, isa.lanes, "int32") - total
            T.buffer_store(self.offsets, start, [T.ramp(t * TILE + part * isa.lanes, 1, isa.lanes)])

    def _start(self, row: Any) -> Any:
        return splat(self.offsets[row], self.isa.lanes)

    def _product(self, total: Any, x: Any, y: Any) -> Any:
        return self.isa.dot4(total, x, y)

    def _softmax(self, queries: Queries) -> Softmax:
        return ByteSoftmax(self.scores, queries.request, self.arguments.params[0], self.isa)

    def _value(self, queries: Queries, channel: Any, word: Any) -> Any:
        row = queries.head * self.spec.head_size + channel
        return self.arguments.v[queries.request.first + word // QUAD, row, word % QUAD]


class PairKernel(VectorKernel):
    """bfloat16, in float32."""

    in_word = 2
    dtype = "float32"
    shared = False

    def allocate(self) -> None:  # noqa: D102
        super().allocate()
        rows = value_blocks(most_tiles(self.spec.max_length)) * self.spec.head_size
        self.values = named("values", T.alloc_buffer((rows, TILE), "int32"))

    def _prepare(self, queries: Queries) -> None:
        arrange_values(self.arguments.v, self.values, 0, queries, self.spec.head_size)

    def _start(self, row: Any) -> Any:
        return splat(0.0, self.isa.lanes)

    def _product(self, total: Any, x: Any, y: Any) -> Any:
        return self.isa.dot2(total, x, y)

    def _softmax(self, queries: Queries) -> Softmax:
        return PairSoftmax(self.scores, queries.request, self.spec.scale, self.isa)

    def _value(self, queries: Queries, channel: Any, word: Any) -> Any:
        return self.values[word // TILE * self.spec.head_size + channel, word % TILE]


def value_blocks(tiles: int) -> int:
    """Blocks of 32 values that ``arrange_values`` makes for a request with tokens in so many tiles."""
    return -(-tiles // 2)


def arrange_values(
    v: Any, rows: Any, first: Any, queries: Queries, head_size: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Put a head's bfloat16 values together, 32 tokens to a row of each channel, from the request's first on.

    Row ``first`` + block · head_size + channel of ``rows``, int32 ``(…, 16)``, holds those of block · 32 … + 31; there
    are ``value_blocks(request.tiles)`` blocks. Past the request's end they are 0. ``meanwhile`` emits something now and
    then.
    """
    request = queries.request
    halves = named("halves", view(rows, (*rows.shape[:1], 2, TILE), "int16"))
    v = named("value_bits", view(v, v.shape, "int16"))
    lanes = T.ramp(0, 1, TILE)
    order = T.Bind(T.ramp(T.cast(request.lead, "int16"), T.int16(1), TILE))
    with T.serial((request.tiles + 1) // 2) as block:
        for half in range(2):
            t = T.Bind(block * 2 + half)
            near, far = (T.Bind(request.first + T.min(t + i, request.tiles - 1)) for i in range(2))
            # All ones in lanes before the end, by the sign of a difference.
            number = T.ramp(T.cast(t * TILE - request.length, "int16"), T.int16(1), TILE)
            own = T.Bind(T.shift_right(number, splat(15, TILE, "int16")))
            meanwhile()
            with T.serial(head_size) as channel:
                row = queries.head * head_size + channel
                shifted = T.call_llvm_pure_intrin(
                    f"int16x{TILE}",
                    "llvm.x86.avx512.vpermi2var.hi.256",
                    v[near, row, lanes],
                    order,
                    v[far, row, lanes],
                )
                T.buffer_store(halves, shifted & own, [first + block * head_size + channel, half, lanes])


def multiply_values(
    isa: Isa,
    knobs: AttentionKnobs,
    head_size: int,
    in_word: int,
    words: Any,
    probability: Callable[[int, Any], Any],
    value: Callable[[Any, Any], Any],
    product: Callable[[Any, Any, Any], Any],
    dtype: str,
    stores: Sequence[Callable[[Any, list[Any]], None]],
) -> None:
    """Emit probabilities × values of one head, for as many vectors of queries as there are ``stores``.

    ``probability(vector, i)`` and ``value(channel, i)`` are the i-th of ``words`` words; a vector's ``store`` gets
    the sums of the channels of each word of results, by its number within the head.
    """

    def block(channel: Any, count: int) -> None:
        sums = [zeros(isa, dtype, len(stores)) for _ in range(count)]
        with T.serial(words) as i:
            p = [T.Bind(probability(j, i)) for j in range(len(stores))]
            for n, of_channel in enumerate(sums):
                broadcast = T.Bind(splat(value(channel + n, i), isa.lanes))
                for s, of_query in zip(of_channel, p, strict=True):
                    T.buffer_store(s, product(s[0], of_query, broadcast), [0])
        for j, store in enumerate(stores):
            for n in range(0, count, in_word):
                store((channel + n) // in_word, [s[j][0] for s in sums[n : n + in_word]])

    count = knobs.accumulators // knobs.queries
    whole, rest = divmod(head_size, count)
    with T.serial(whole) as i:
        block(i * count, count)
    if rest:
        block(whole * count, rest)


def _store_at(store: Callable[[Any, list[Any]], None], begin: Any, word: Any, sums: list[Any]) -> None:
    store(begin + word, sums)


def zeros(isa: Isa, dtype: str, count: int) -> list[Any]:
    """Allocate registers that hold 0."""
    registers = [isa.register(dtype) for _ in range(count)]
    for register in registers:
        T.buffer_store(register, splat(0, isa.lanes, "int32") if dtype == "int32" else splat(0.0, isa.lanes), [0])
    return registers
