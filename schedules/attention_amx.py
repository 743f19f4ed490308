"""Attention with integer products on AMX: 16 keys × up to 64 channels × 16 queries, 16 channels × 64 keys × 16 queries.

Queries stay the lanes, as in whet.schedules.attention_i8, and quads of queries and of probabilities are AMX's second
operand as they lie in memory. The first operand has keys, or channels of values, as rows of 64 bytes: keys are
transposed and values gathered once for all queries of a unit of work.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules import amx
from whet.schedules.attention_arguments import Arguments, most_tiles
from whet.schedules.attention_i8 import VectorKernel
from whet.schedules.attention_softmax import SCORE_ZERO, Softmax, sum_of_quads
from whet.schedules.elementwise import QUAD
from whet.schedules.gemm import named
from whet.schedules.isa import TILE, Isa, splat, view
from whet.schedules.segments import Queries, for_each_request

if TYPE_CHECKING:
    from whet.schedules.attention import AttentionKnobs, AttentionSpec

_SUMS = range(4)
"""Tile registers of the second product: sums of 16 channels each."""
_FIRST, _SECOND = 4, 5
"""Its operands; the first product takes _FIRST too."""
_SCORES, _QUERIES = 6, 7
"""Sums and second operand of the first product."""

_WORDS = amx.ROW_BYTES // QUAD
"""int32 in a row of a tile register."""

_SHORT = 2
"""Most tiles of a request that vector instructions compute faster."""


def supports(spec: AttentionSpec, isa: Isa) -> bool:
    """Whether this family computes the attention: heads must fill rows of tile registers."""
    size = spec.head_size
    return isa.name == "amx_int8" and spec.precision == "i8" and size % TILE == 0 and size <= len(_SUMS) * TILE


def attention_amx(spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs) -> tirx.PrimFunc:
    """Kernel of an ``i8`` specification."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention_amx")
            arguments = Arguments.declare(spec)
            with T.sblock("root"):
                T.reads()
                T.writes()
                kernel = _Kernel(spec, isa, knobs, arguments.viewed())
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


class _Kernel:
    """The attention of some queries of one head to the keys of one request."""

    def __init__(self, spec: AttentionSpec, isa: Isa, knobs: AttentionKnobs, arguments: Arguments) -> None:
        self.isa, self.arguments = isa, arguments
        self.size, self.quads = spec.head_size, spec.head_size // QUAD
        self.every = T.ramp(0, 1, TILE)
        # Where areas of the memory begin, whose rows, as those of the tile registers, are 64 bytes.
        tiles = most_tiles(spec.max_length)
        blocks = -(-tiles // QUAD)
        areas = [tiles * TILE, blocks * _WORDS, tiles * TILE, blocks * self.size, _WORDS, self.size, 1]
        _, self.probabilities, self.keys, self.values, self.queries, self.sums, self.start, self.rows = accumulate(
            areas, initial=0
        )
        self.score_rows = areas[0]
        most_short = (_SHORT - 1) * TILE + 1
        self.short = VectorKernel(replace(spec, max_length=most_short), isa, knobs, arguments)

    def allocate(self) -> None:
        """Allocate what one unit of parallel work needs; rows are the request's."""
        self.short.allocate()
        self.memory = named("memory", T.alloc_buffer((self.rows, _WORDS), "int32"))
        self.scores = view(self.memory, (1, self.score_rows, TILE), "int32")

    def attend(self, queries: Queries) -> None:
        """Emit everything; short requests are not worth what it takes to set AMX up."""
        with T.If(queries.request.tiles <= _SHORT):
            with T.Then():
                self.short.attend(queries)
            with T.Else():
                self._attend(queries)

    def _attend(self, queries: Queries) -> None:
        """Attend with AMX: while one tile's exponentials keep the vector units busy, AMX multiplies for its neighbours.

        Step s computes the scores of tile s, the probabilities of tile s - 1 and the result of tile s - 2.
        """
        request = queries.request
        amx.configure([(amx.ROWS, amx.ROW_BYTES)] * amx.REGISTERS)
        T.buffer_store(self.memory, splat(SCORE_ZERO, TILE, "int32"), [self.start, self.every])
        for quad in range(self.quads, _WORDS):
            # Where a head is less than a row of keys, what stands there is multiplied by 0.
            T.buffer_store(self.memory, splat(0, TILE, "int32"), [self.queries + quad, self.every])
        self._arrange_keys(queries)
        self._arrange_values(queries)
        softmax = Softmax(self.scores, request, self.arguments.params[0], self.isa)
        blocks = T.Bind((request.tiles + (QUAD - 1)) // QUAD)
        self._clear_neighbours(softmax, blocks)
        offset = self.isa.register("float32")
        total, finished = (self.isa.register("int32") for _ in range(2))
        with T.serial(queries.count + 2) as step:
            scores = T.Bind(step < queries.count)
            probabilities = T.Bind(tirx.all(step >= 1, step <= queries.count))
            context = T.Bind(step >= 2)
            with T.If(scores), T.Then():
                self._load_queries(queries, queries.tile + step)
            with T.If(context), T.Then():
                for register in _SUMS[: self.size // TILE]:
                    amx.zero(register)
            T.buffer_store(total, splat(0, TILE, "int32"), [0])
            maxima = softmax.maxima()
            with T.serial(blocks) as block, T.serial(QUAD) as j:
                for i in range(self.size // TILE):
                    with T.If(tirx.all(context, j == i)), T.Then():
                        self._add_values(block, i)
                t = T.Bind(block * QUAD + j)
                with T.If(tirx.all(probabilities, t < request.tiles)), T.Then():
                    self._probabilities(softmax, t, offset, total)
                with T.If(tirx.all(scores, t < request.tiles)), T.Then():
                    self._scores(t)
                    # The tile before, as this one's products take their time.
                    with T.If(t > 0):
                        with T.Then():
                            self._raise_maxima(softmax, maxima, t - 1)
                        with T.Else():
                            softmax.hide_others(0, 0, request.end)
            with T.If(context), T.Then():
                self._store_context(queries, queries.tile + step - 2, finished[0])
            T.buffer_store(finished, total[0], [0])
            with T.If(scores), T.Then():
                softmax.hide_others(0, request.lead, request.tiles * TILE)
                self._raise_maxima(softmax, maxima, request.tiles - 1)
                T.buffer_store(offset, softmax.offset(maxima), [0])
        amx.release()

    def _arrange_keys(self, queries: Queries) -> None:
        """Transpose quads of 16 keys to rows of up to 64 channels, in squares of 4 × 4 quads."""
        request = queries.request
        squares = self.quads // QUAD
        order = [min(i, squares - 1) for i in range(1 << (squares - 1).bit_length())]
        with T.serial(request.tiles) as t:
            self._keep_awake()
            first = queries.head * self.quads
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

    def _keep_awake(self) -> None:
        """Multiply something: after a few hundred idle cycles AMX takes as many again to start."""
        amx.multiply_add("tdpbssd", _SCORES, _FIRST, _SECOND)

    def _clear_neighbours(self, softmax: Softmax, blocks: Any) -> None:
        """Make the probabilities of keys that are not the request's, but share steps of 64 with it, 0."""
        end = softmax.first + softmax.quads
        for begin, count in ((0, softmax.first), (end, blocks * _WORDS - end)):
            with T.serial(count) as i:
                T.buffer_store(self.memory, splat(0, TILE, "int32"), [self.probabilities + begin + i, self.every])

    def _load_queries(self, queries: Queries, tile: Any) -> None:
        """Load a tile of queries less their zero point as int8: 128 is the sign bit."""
        with T.serial(self.quads) as quad:
            words = self.arguments.q[tile, queries.head * self.quads + quad, self.every]
            T.buffer_store(self.memory, words ^ splat(-0x7F7F7F80, TILE, "int32"), [self.queries + quad, self.every])
        amx.load(_QUERIES, self._address(self.queries), amx.ROW_BYTES)

    def _probabilities(self, softmax: Softmax, tile: Any, offset: Any, total: Any) -> None:
        """Compute those of a tile of keys and add them to the total."""
        first = T.Bind(T.max(softmax.first, tile * QUAD))
        with T.serial(T.min(softmax.first + softmax.quads, (tile + 1) * QUAD) - first) as i:
            quad = named("quad", T.Bind(first + i))
            p = softmax.quad(0, quad, offset[0])
            T.buffer_store(self.memory, p, [self.probabilities + quad, self.every])
            T.buffer_store(total, sum_of_quads(self.isa, total[0], p), [0])

    def _scores(self, tile: Any) -> None:
        """Compute those of a tile of keys."""
        amx.load(_SCORES, self._address(self.start), 0)
        amx.load(_FIRST, self._address(self.keys + tile * TILE), amx.ROW_BYTES)
        amx.multiply_add("tdpbssd", _SCORES, _FIRST, _QUERIES)
        amx.store(_SCORES, self._address(tile * TILE), amx.ROW_BYTES)

    def _raise_maxima(self, softmax: Softmax, maxima: list[Any], tile: Any) -> None:
        for i in range(0, TILE, QUAD):
            softmax.raise_maxima(maxima, 0, tile * TILE + i)

    def _add_values(self, block: Any, i: int) -> None:
        """Add to the i-th 16 channels' sums the products of 64 keys' probabilities and values."""
        if i == 0:
            amx.load(_SECOND, self._address(self.probabilities + block * _WORDS), amx.ROW_BYTES)
        amx.load(_FIRST, self._address(self.values + block * self.size + i * TILE), amx.ROW_BYTES)
        amx.multiply_add("tdpbsud", _SUMS[i], _FIRST, _SECOND)

    def _address(self, row: Any) -> Any:
        """Address of a row of the memory; ``access_ptr`` as amx.store wants it."""
        return self.memory.access_ptr("rw", offset=row * _WORDS)

    def _store_context(self, queries: Queries, tile: Any, total: Any) -> None:
        for i in range(self.size // TILE):
            amx.store(_SUMS[i], self._address(self.sums + i * TILE), amx.ROW_BYTES)
        store = self.arguments.context(self.isa, queries.request, (tile, 0), total)
        with T.serial(self.quads) as quad:
            store(
                queries.head * self.quads + quad,
                [self.memory[self.sums + quad * QUAD + i, self.every] for i in range(QUAD)],
            )


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
