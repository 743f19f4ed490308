"""The softmax of int8 and bfloat16 attention: scores, one row of queries per key, to words of probabilities.

int8: probabilities of 8 bits, 255 for the highest. Scores are integers kept as floats ``SCORE_ZERO`` + s, which an
integer sum that starts from the bits of ``SCORE_ZERO`` is without a conversion as long as |s| < 2²². Exponentials are
computed in 16 bits, twice as many to a vector and rounded alike by every instruction set.

bfloat16: 1 for the highest. Four keys are taken from a request's first on, wherever in a tile it starts, so that the
order of all sums is the same.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import QUAD
from whet.schedules.isa import Isa, fma, instruction, pack_bytes, round2, round_bf16, splat
from whet.schedules.segments import Request, blend, lanes_before
from whet.schedules.vector_math import exp2_of_products

SCORE_ZERO = 0x4B400000
"""The bits of 1.5·2²³."""

MAX_HEAD_SIZE = 256
"""Largest head whose scores, at most 128 · 127 a channel, stay below 2²²."""

_NOTHING = -0x00800000
"""The bits of −∞."""

_RANGE = 16
"""2^t is computed for −16 ≤ t ≤ 0; 255·2^t rounds to 0 from −9 down."""

_SQUARINGS = 4
_ROOT = (32760, 22659, 7216)
"""(255/256·2^(16z))^(1/16) for −1 ≤ z ≤ 0 as c₀ + c₁·z + c₂·z², all in 1/32768.

Minimax in the error of 255·2^(16z), which is 0.05; with the roundings to 16 bits it is 0.16."""


_LEAST_EXPONENT = -200.0
"""2^-200 is 0 in bfloat16, as is that of a hidden score."""

_DEGREE = 3
"""Of the polynomial: its error is a fortieth of the rounding to bfloat16."""


class Softmax:
    """Softmax over the keys of one request, for vectors of queries whose scores are rows of a buffer.

    The buffer holds the bits of floats, int32 ``(vectors, rows, lanes)``. Four rows are handled together, from
    ``first`` on, ``quads`` times.
    """

    words: int
    """That the probabilities of four keys take."""
    dtype: str
    """Of sums of probabilities."""
    first: Any
    quads: Any

    def __init__(self, scores: Any, request: Request, factor: Any, isa: Isa) -> None:
        """Take the buffer and the factor from scores to what ``quad`` computes with, a scalar expression."""
        self.scores, self.request, self.isa = scores, request, isa
        self.factor = T.Bind(splat(factor, isa.lanes))
        self.every = T.ramp(0, 1, isa.lanes)

    def row(self, quad: Any) -> Any:
        """First row of a quad."""
        raise NotImplementedError

    def quad(self, vector: int, quad: Any, offset: Any) -> list[Any]:
        """Probabilities of four keys as int32 vectors, words that hold one or several keys each."""
        raise NotImplementedError

    def added(self, total: Any, word: Any) -> Any:
        """The total with the probabilities of a word added in each lane."""
        raise NotImplementedError

    def hide_others(self, vector: int, begin: Any, end: Any) -> None:
        """Give the rows from ``begin`` and to ``end`` that are other requests' keys scores of −∞."""
        for row, count in ((begin, self.request.lead - begin), (self.request.end, end - self.request.end)):
            with T.serial(count) as i:
                T.buffer_store(self.scores, splat(_NOTHING, self.isa.lanes, "int32"), [vector, row + i, self.every])

    def hide_members(self, vector: int, part: Any) -> None:
        """Where requests share the tile, give each one's queries scores of −∞ for the others' keys.

        The vector's first lane is the tile's ``part · lanes``-th.
        """
        lanes = self.isa.lanes

        def hide(begin: Any, end: Any) -> None:
            first = part * lanes
            own = T.Bind(lanes_before(first, end, self.isa) & ~lanes_before(first, begin, self.isa))
            with T.serial(end - begin) as i:
                where = [vector, begin + i, self.every]
                score = self.scores[tuple(where)]
                T.buffer_store(self.scores, blend(own, score, splat(_NOTHING, lanes, "int32")), where)

        self.request.for_each_member(hide)

    def maxima(self) -> list[Any]:
        """Variables for the highest scores so far, four because one would be waited for."""
        chains = [self.isa.register("float32") for _ in range(QUAD)]
        nothing = T.reinterpret(f"float32x{self.isa.lanes}", splat(_NOTHING, self.isa.lanes, "int32"))
        for m in chains:
            T.buffer_store(m, nothing, [0])
        return chains

    def raise_maxima(self, maxima: list[Any], vector: int, row: Any) -> None:
        """Take four rows in."""
        for i, m in enumerate(maxima):
            T.buffer_store(m, T.max(m[0], self._score(vector, row + i)), [0])

    def highest(self, maxima: list[Any]) -> Any:
        """Highest score of each query."""
        a, b, c, d = (m[0] for m in maxima)
        return T.max(T.max(a, b), T.max(c, d))

    def offset(self, maxima: list[Any]) -> Any:
        """What ``quad`` takes scores off from."""
        raise NotImplementedError

    def _score(self, vector: int, row: Any) -> Any:
        return T.reinterpret(f"float32x{self.isa.lanes}", self.scores[vector, row, self.every])


class ByteSoftmax(Softmax):
    """To four bytes in a word; quads are counted from the first tile's first row."""

    words = 1
    dtype = "int32"

    def __init__(self, scores: Any, request: Request, factor: Any, isa: Isa) -> None:
        """Take the buffer and the factor of the scores, a scalar expression."""
        # t/16 in 1/32768 is 2048·t.
        super().__init__(scores, request, factor * T.float32(math.log2(math.e) * 32768 / _RANGE), isa)
        self.first, self.quads = request.blocks(QUAD)

    def row(self, quad: Any) -> Any:  # noqa: D102
        return quad * QUAD

    def offset(self, maxima: list[Any]) -> Any:
        """Minus the highest score of each query, times the factor."""
        return T.Bind(-(self.highest(maxima) * self.factor))

    def quad(self, vector: int, quad: Any, offset: Any) -> list[Any]:  # noqa: D102
        lanes = self.isa.lanes
        a, b, c, d = (fma(self._score(vector, self.row(quad) + i), self.factor, offset) for i in range(QUAD))
        ab, cd = (_exp2(T.Bind(round2(*pair, lanes)), lanes) for pair in ((a, b), (c, d)))
        return [T.Bind(pack_bytes(ab, cd, lanes))]

    def added(self, total: Any, word: Any) -> Any:  # noqa: D102
        return self.isa.dot4(total, word, splat(0x01010101, self.isa.lanes, "int32"))


class PairSoftmax(Softmax):
    """To two bfloat16 in a word; quads are counted from the request's first row."""

    words = 2
    dtype = "float32"

    def __init__(self, scores: Any, request: Request, factor: float, isa: Isa) -> None:
        """Take the buffer and the factor of the scores."""
        factor *= math.log2(math.e)
        super().__init__(scores, request, factor, isa)
        self.least = splat(_LEAST_EXPONENT / factor, isa.lanes)
        self.first, self.quads = 0, T.Bind((request.length + (QUAD - 1)) // QUAD)

    def row(self, quad: Any) -> Any:  # noqa: D102
        return self.request.lead + quad * QUAD

    def offset(self, maxima: list[Any]) -> Any:
        """Highest score of each query: scores may be too large for the difference of products."""
        return T.Bind(self.highest(maxima))

    def quad(self, vector: int, quad: Any, offset: Any) -> list[Any]:  # noqa: D102
        lanes = self.isa.lanes
        rows = [self._score(vector, self.row(quad) + i) - offset for i in range(QUAD)]
        rows = [T.Bind(T.max(row, self.least)) for row in rows]
        a, b, c, d = exp2_of_products(rows, self.factor, 1.0, lanes, _DEGREE)
        return [T.Bind(round_bf16(*pair)) for pair in ((a, b), (c, d))]

    def added(self, total: Any, word: Any) -> Any:  # noqa: D102
        return self.isa.dot2(total, word, splat(0x3F803F80, self.isa.lanes, "int32"))


def _exp2(z: Any, lanes: int) -> Any:
    """``round(255 · 2^(z/2048))`` of int16, z at most 0 or nearly so."""
    dtype = f"int16x{2 * lanes}"

    def const(value: int) -> Any:
        return splat(value, 2 * lanes, "int16")

    def times(a: Any, b: Any) -> Any:
        """Rounded ``a·b / 32768``."""
        return T.Bind(instruction(dtype, "pmul.hr.sw", lanes, a, b))

    constant, linear, quadratic = (const(c) for c in _ROOT)
    inner = times(z, quadratic) + linear
    # Saturating, because the highest score's product was rounded on its way: z may be above 0.
    y = T.Bind(T.call_llvm_pure_intrin(dtype, "llvm.sadd.sat", times(z, inner), constant))
    for _ in range(_SQUARINGS):
        y = times(y, y)
    return times(y, const(256))
