"""Attention on AMX: products of 16 keys × 64 bytes of channels × 16 queries, and of 16 channels × 64 bytes of keys.

Queries stay the lanes, as in whet.schedules.attention_vector, and words of queries and of probabilities are AMX's
second operand as they lie in memory. The first operand has keys, or channels of values, as rows of 64 bytes: keys are
transposed and values gathered once for all queries of a unit of work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules import amx, attention_vector
from whet.schedules.attention_arguments import Arguments, Keep, most_tiles
from whet.schedules.attention_softmax import SCORE_ZERO, ByteSoftmax, PairSoftmax, Softmax
from whet.schedules.attention_vector import VectorKernel, arrange_values
from whet.schedules.elementwise import QUAD
from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat, view
from whet.schedules.segments import Queries, for_each_request
from whet.schedules.tiles import transpose

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_SUMS = range(4)
"""Tile registers of the second product: sums of 16 channels each."""
_FIRST, _SECOND = 4, 5
"""Its operands; the first product takes them too."""
_SCORES, _QUERIES = 6, 7
"""Sums and second operand of the first product."""

_WORDS = amx.ROW_BYTES // 4
"""int32 in a row of a tile register."""

_SHORT = 2
"""Most tiles that a request fills which vector instructions compute faster."""


def supports(spec: AttentionSpec, isa: Isa) -> bool:
    """Whether this family computes the attention: heads must fill rows of tile registers."""
    if not isa.has_amx or spec.precision != ("bf16" if isa.dot == "bf16" else "i8"):
        return False
    return (
        spec.head_size % (2 * TILE if spec.precision == "bf16" else TILE) == 0 and spec.head_size <= len(_SUMS) * TILE
    )


def attention_amx(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``i8`` or ``bf16`` specification."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention_amx")
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
    kind = _ByteKernel if spec.precision == "i8" else _PairKernel
    kernel = kind(spec, isa, knobs, arguments.viewed(), keep)
    for_each_request(
        spec.heads,
        knobs.unit,
        arguments.segments,
        arguments.tiles,
        kernel.allocate,
        kernel.attend,
        shared=kernel.short.shared,
        first_only=spec.first_only,
    )


class _Kernel:
    """The attention of some queries of one head to the keys of one request."""

    in_step: int
    """Tiles of keys that fill the rows of the second product's operand."""
    product: str
    """The instruction of the second product."""
    short: VectorKernel
    """What computes short requests."""

    def __init__(self, spec: AttentionSpec, isa: Isa, arguments: Arguments, keep: Keep | None) -> None:
        self.spec, self.isa, self.arguments, self.keep = spec, isa, arguments, keep
        self.size = spec.head_size
        self.words = int(arguments.q.shape[1]) // spec.heads
        self.every = T.ramp(0, 1, TILE)
        # Where areas of the memory begin, whose rows, as those of the tile registers, are 64 bytes.
        self.rows = 0
        tiles = most_tiles(spec.max_length)
        steps = -(-tiles // self.in_step)
        # Up to three rows of scores are hidden past the last tile's.
        self.score_rows = tiles * TILE + QUAD
        self.area(self.score_rows)
        self.probabilities = self.area(steps * _WORDS)
        self.keys = self.area(tiles * TILE * -(-self.words // _WORDS))
        self.values = self.area(steps * self.size)
        self.sums = self.area(self.size)

    def area(self, rows: int) -> int:
        """Reserve rows of the memory; returns the first."""
        self.rows += rows
        return self.rows - rows

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs; rows are the request's."""
        self.short.allocate()
        self.memory = named("memory", T.alloc_buffer((self.rows, _WORDS), "int32"))
        self.scores = view(self.memory, (1, self.score_rows, TILE), "int32")

    def attend(self, queries: Queries) -> None:
        """Emit everything; short requests are not worth what it takes to set AMX up."""
        with T.If(self._is_short(queries)):
            with T.Then():
                self.short.attend(queries)
            with T.Else(), self.isa.definitions():
                self._attend(queries)

    def _is_short(self, queries: Queries) -> Any:
        raise NotImplementedError

    def _prepare(self, queries: Queries) -> None:
        """Arrange keys and values."""
        raise NotImplementedError

    def _softmax(self, queries: Queries) -> Softmax:
        raise NotImplementedError

    def _load_queries(self, queries: Queries, tile: Any) -> None:
        """Get a tile of queries ready."""
        raise NotImplementedError

    def _multiply_keys(self, queries: Queries, tile: Any, of_queries: Any) -> None:
        """Set _SCORES to the product of a tile of keys and a tile of queries; leaves _SECOND alone."""
        raise NotImplementedError

    def _attend(self, queries: Queries) -> None:
        """Attend with AMX: while one tile's exponentials keep the vector units busy, AMX multiplies for its neighbours.

        Step s computes the scores of tile s, the probabilities of tile s - 1 and the result of tile s - 2.
        """
        request = queries.request
        amx.configure([(amx.ROWS, amx.ROW_BYTES)] * amx.REGISTERS)
        self._prepare(queries)
        softmax = self._softmax(queries)
        steps = T.Bind((request.tiles + (self.in_step - 1)) // self.in_step)
        self._clear_neighbours(softmax, steps)
        offset = self.isa.register("float32")
        total, finished = (self.isa.register(softmax.dtype) for _ in range(2))
        nothing = splat(0.0 if softmax.dtype == "float32" else 0, TILE, softmax.dtype)
        with T.serial(queries.count + 2) as turn:
            scores = T.Bind(turn < queries.count)
            probabilities = T.Bind(tirx.all(turn >= 1, turn <= queries.count))
            context = T.Bind(turn >= 2)
            with T.If(scores), T.Then():
                self._load_queries(queries, queries.tile + turn)
            with T.If(context), T.Then():
                for register in _SUMS[: self.size // TILE]:
                    amx.zero(register)
            T.buffer_store(total, nothing, [0])
            maxima = softmax.maxima()
            with T.serial(steps) as step, T.serial(self.in_step) as j:
                for i in range(self.size // TILE):
                    with T.If(tirx.all(context, j == i % self.in_step)), T.Then():
                        self._add_values(step, i)
                t = T.Bind(step * self.in_step + j)
                with T.If(tirx.all(probabilities, t < request.tiles)), T.Then():
                    self._probabilities(softmax, (queries, queries.tile + turn - 1), t, offset, total)
                with T.If(tirx.all(scores, t < request.tiles)), T.Then():
                    self._multiply_keys(queries, t, queries.tile + turn)
                    amx.store(_SCORES, self._address(t * TILE), amx.ROW_BYTES)
                    # The tile before, as this one's products take their time.
                    with T.If(t > 0):
                        with T.Then():
                            self._raise_maxima(softmax, maxima, t - 1)
                        with T.Else():
                            softmax.hide_others(0, 0, request.end)
            with T.If(context), T.Then():
                self._store_context(queries, queries.tile + turn - 2, finished[0])
            T.buffer_store(finished, total[0], [0])
            with T.If(scores), T.Then():
                end = softmax.row(softmax.first + softmax.quads)
                softmax.hide_others(0, request.lead, T.max(request.tiles * TILE, end))
                self._raise_maxima(softmax, maxima, request.tiles - 1)
                T.buffer_store(offset, softmax.offset(maxima), [0])
        amx.release()

    def _keep_awake(self) -> None:
        """Multiply something: after a few hundred idle cycles AMX takes as many again to start."""
        amx.multiply_add(self.product, _SCORES, _FIRST, _SECOND)

    def _clear_neighbours(self, softmax: Softmax, steps: Any) -> None:
        """Make the probabilities of keys that are not the request's, but share steps with it, 0."""
        own, end = (quad * softmax.words for quad in (softmax.first, softmax.first + softmax.quads))
        for begin, count in ((0, own), (end, steps * _WORDS - end)):
            with T.serial(count) as i:
                T.buffer_store(self.memory, splat(0, TILE, "int32"), [self.probabilities + begin + i, self.every])

    def _probabilities(
        self, softmax: Softmax, of_queries: tuple[Queries, Any], tile: Any, offset: Any, total: Any
    ) -> None:
        """Compute those of a tile of keys for a tile of queries and add them to the total."""
        first = T.Bind(T.max(softmax.first, tile * QUAD))
        count = T.Bind(T.min(softmax.first + softmax.quads, (tile + 1) * QUAD) - first)
        with T.serial(count) as i:
            quad = named("quad", T.Bind(first + i))
            for w, p in enumerate(softmax.quad(0, quad, offset[0])):
                row = self.probabilities + quad * softmax.words + w
                T.buffer_store(self.memory, p, [row, self.every])
                T.buffer_store(total, softmax.added(total[0], p), [0])
        if self.keep is not None:
            queries, of_tile = of_queries
            row = self.probabilities
            self.keep(queries, (of_tile, 0), first, count, lambda quad: self.memory[row + quad, self.every])

    def _raise_maxima(self, softmax: Softmax, maxima: list[Any], tile: Any) -> None:
        for i in range(0, TILE, QUAD):
            softmax.raise_maxima(maxima, 0, tile * TILE + i)

    def _add_values(self, step: Any, i: int) -> None:
        """Add to the i-th 16 channels' sums the products of a step's probabilities and values."""
        if i == 0:
            amx.load(_SECOND, self._address(self.probabilities + step * _WORDS), amx.ROW_BYTES)
        amx.load(_FIRST, self._address(self.values + step * self.size + i * TILE), amx.ROW_BYTES)
        amx.multiply_add(self.product, _SUMS[i], _FIRST, _SECOND)

    def _address(self, row: Any) -> Any:
        """Address of a row of the memory; ``access_ptr`` as amx.store wants it."""
        return self.memory.access_ptr("rw", offset=row * _WORDS)

    def _store_context(self, queries: Queries, tile: Any, total: Any) -> None:
        for i in range(self.size // TILE):
            amx.store(_SUMS[i], self._address(self.sums + i * TILE), amx.ROW_BYTES)
        store = self.arguments.context(self.isa, queries.request, (tile, 0), total)
        in_word = self.size // self.words
        with T.serial(self.words) as word:
            rows = [self.memory[self.sums + word * in_word + i, self.every] for i in range(in_word)]
            if self.short.dtype == "float32":
                rows = [T.reinterpret(f"float32x{TILE}", row) for row in rows]
            store(queries.head * self.words + word, rows)


class _ByteKernel(_Kernel):
    """u8 × s8."""

    in_step = 4
    product = "tdpbsud"

    def __init__(
        self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments, keep: Keep | None
    ) -> None:
        super().__init__(spec, isa, arguments, keep)
        self.queries, self.start = self.area(_WORDS), self.area(1)
        most_short = (_SHORT - 1) * TILE + 1
        self.short = attention_vector.ByteKernel(replace(spec, max_length=most_short), isa, knobs, arguments, keep)

    def _is_short(self, queries: Queries) -> Any:
        return queries.request.tiles <= _SHORT

    def _softmax(self, queries: Queries) -> Softmax:
        return ByteSoftmax(self.scores, queries.request, self.arguments.params[0], self.isa)

    def _prepare(self, queries: Queries) -> None:
        T.buffer_store(self.memory, splat(SCORE_ZERO, TILE, "int32"), [self.start, self.every])
        for quad in range(self.words, _WORDS):
            # Where a head is less than a row of keys, what stands there is multiplied by 0.
            T.buffer_store(self.memory, splat(0, TILE, "int32"), [self.queries + quad, self.every])
        self._arrange_keys(queries)
        self._arrange_values(queries)

    def _arrange_keys(self, queries: Queries) -> None:
        """Transpose quads of 16 keys to rows of up to 64 channels, in squares of 4 × 4 quads."""
        request = queries.request
        squares = self.words // QUAD
        order = [min(i, squares - 1) for i in range(1 << (squares - 1).bit_length())]
        with T.serial(request.tiles) as t:
            self._keep_awake()
            first = queries.head * self.words
            for key in range(0, TILE, QUAD):
                columns = [
                    _concatenate(
                        [
                            self.arguments.k[request.first + t, first + square * QUAD + i, T.ramp(key, 1, QUAD)]
                            for square in order
                        ]
                    )
                    for i in range(QUAD)
                ]
                for i, row in enumerate(_transposed(columns)):
                    T.buffer_store(self.memory, row, [self.keys + t * TILE + key + i, T.ramp(0, 1, QUAD * len(order))])

    def _arrange_values(self, queries: Queries) -> None:
        """Put 16 bytes of 4 tiles beside each other; past the request, where probabilities are 0, anything."""
        request = queries.request
        with T.serial((request.tiles + (QUAD - 1)) // QUAD) as block:
            tiles = [T.Bind(request.first + T.min(block * QUAD + i, request.tiles - 1)) for i in range(QUAD)]
            self._keep_awake()
            with T.serial(self.size) as channel:
                pieces = [
                    self.arguments.v[tile, queries.head * self.size + channel, T.ramp(0, 1, QUAD)] for tile in tiles
                ]
                T.buffer_store(
                    self.memory, _concatenate(pieces), [self.values + block * self.size + channel, self.every]
                )

    def _load_queries(self, queries: Queries, tile: Any) -> None:
        """Load a tile of queries less their zero point as int8: 128 is the sign bit."""
        with T.serial(self.words) as quad:
            words = self.arguments.q[tile, queries.head * self.words + quad, self.every]
            T.buffer_store(self.memory, words ^ splat(-0x7F7F7F80, TILE, "int32"), [self.queries + quad, self.every])
        amx.load(_QUERIES, self._address(self.queries), amx.ROW_BYTES)

    def _multiply_keys(self, queries: Queries, tile: Any, of_queries: Any) -> None:
        amx.load(_SCORES, self._address(self.start), 0)
        amx.load(_FIRST, self._address(self.keys + tile * TILE), amx.ROW_BYTES)
        amx.multiply_add("tdpbssd", _SCORES, _FIRST, _QUERIES)


class _PairKernel(_Kernel):
    """bfloat16: a head is one or two rows of keys.

    What is short goes by length, not by tiles: the vector kernel rounds elsewhere, and bytes must not depend on where
    in a tile a request starts.
    """

    in_step = 2
    product = "tdpbf16ps"

    def __init__(
        self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments, keep: Keep | None
    ) -> None:
        super().__init__(spec, isa, arguments, keep)
        self.parts = self.words // _WORDS
        self.short = attention_vector.PairKernel(replace(spec, max_length=_SHORT * TILE), isa, knobs, arguments, keep)

    def _is_short(self, queries: Queries) -> Any:
        return queries.request.length <= _SHORT * TILE

    def _softmax(self, queries: Queries) -> Softmax:
        return PairSoftmax(self.scores, queries.request, self.spec.scale, self.isa)

    def _prepare(self, queries: Queries) -> None:
        request = queries.request
        with T.serial(request.tiles) as t:
            for part in range(self.parts):
                self._keep_awake()
                first = queries.head * self.words + part * _WORDS
                rows = [T.Bind(self.arguments.k[request.first + t, first + w, self.every]) for w in range(_WORDS)]
                for i, row in enumerate(transpose(rows)):
                    at = self.keys + (t * self.parts + part) * TILE + i
                    T.buffer_store(self.memory, row, [at, self.every])
        arrange_values(self.arguments.v, self.memory, self.values, queries, self.size, self._keep_awake)

    def _load_queries(self, queries: Queries, tile: Any) -> None:
        """Nothing: there is no register for two parts, so they are loaded each time."""

    def _multiply_keys(self, queries: Queries, tile: Any, of_queries: Any) -> None:
        amx.zero(_SCORES)
        for part in range(self.parts):
            amx.load(_FIRST, self._address(self.keys + (tile * self.parts + part) * TILE), amx.ROW_BYTES)
            word = queries.head * self.words + part * _WORDS
            amx.load(_QUERIES, T.address_of(self.arguments.q[of_queries, word, 0]), amx.ROW_BYTES)
            amx.multiply_add("tdpbf16ps", _SCORES, _FIRST, _QUERIES)


def _concatenate(vectors: list[Any]) -> Any:
    """Join vectors of 4 lanes."""
    return T.Bind(tirx.Shuffle(vectors, [T.int32(i) for i in range(QUAD * len(vectors))]))


def _transposed(rows: list[Any]) -> list[Any]:
    """Transpose 4 × 4 lanes in each 128 bits of four vectors."""
    lanes = rows[0].ty.dtype.lanes

    def pairs(a: Any, b: Any, *order: int) -> Any:
        """Take lanes 0…3 of ``a`` and 4…7 of ``b`` within each 128 bits."""
        indices = [low + i % QUAD + i // QUAD * lanes for low in range(0, lanes, QUAD) for i in order]
        return T.Bind(tirx.Shuffle([a, b], [T.int32(i) for i in indices]))

    a, b, c, d = rows
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    first, second = (0, 1, 4, 5), (2, 3, 6, 7)
    halves = [(pairs(a, b, *order), pairs(c, d, *order)) for order in (low, high)]
    return [pairs(*half, *order) for half in halves for order in (first, second)]
