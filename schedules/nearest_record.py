"""The look-up in a memo file: the key of a request, the record with the nearest key, how far its tokens are.

The distance of two requests of the same number of tokens and the same token types is that of the vectors of their
words, place by place: the root of the mean over places of the squared distance. A key of a fixed size has nearly the
same distances: the sum of the vectors with signs that belong to the places (and the other way round for a token type
that is odd). It finds the nearest record; whether that is near enough its tokens say.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.gemm import named, parameter
from whet.schedules.isa import Isa, fma, splat

DIMENSIONS = 64
"""Of the vectors of words and of keys."""

_LEAST = 1e-9
"""Distance of requests whose tokens differ, at least: 0 is of the same tokens alone."""


def key(isa: Isa) -> tirx.PrimFunc:
    """Kernel for keys of requests.

    Arguments: tokens ``(2, t)`` int32, ids and types; segments ``(r, 2)`` int32, the first token of each request and
    how many; vectors ``(vocabulary, DIMENSIONS)`` float32; signs ``(places, DIMENSIONS)`` int8, 1 or −1; out
    ``(r, DIMENSIONS)`` float32.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("key")
            request = _Request(isa)
            out = parameter("out", (request.count, DIMENSIONS), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.serial(request.count) as i:
                    request.key(i, out, [i])
        return builder.get()


def nearest(isa: Isa) -> tirx.PrimFunc:
    """Kernel for the nearest records, serial: few requests are asked for at once, and each takes microseconds.

    Arguments: the first four of ``key``; keys ``(n, DIMENSIONS)`` float32, of records; order ``(m,)`` int64, numbers
    of records by their lengths; begin ``(b,)`` int64, where those of a length begin in it; entries ``(n, 3)``
    int64, of which the first says at which byte a record's tokens are, ids and then types; words ``(w,)`` int32, these
    bytes. Outputs: number ``(r,)`` int64 of the nearest record of the request's length, −1 if there is none; distance
    ``(r,)`` float32, infinite if there is none or its token types are others.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("nearest")
            request = _Request(isa)
            n, m, b, w = (named(name, T.int64()) for name in "nmbw")
            keys = parameter("keys", (n, DIMENSIONS), "float32")
            order, begin = parameter("order", (m,), "int64"), parameter("begin", (b,), "int64")
            entries, words = parameter("entries", (n, 3), "int64"), parameter("words", (w,), "int32")
            number = parameter("number", (request.count,), "int64")
            distance = parameter("distance", (request.count,), "float32")

            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.serial(request.count) as i:
                    T.buffer_store(number, T.int64(-1), [i])
                    T.buffer_store(distance, T.infinity("float32"), [i])
                    length = request.segments[i, 1]
                    first, last = (named(name, T.Bind(begin[length + j])) for j, name in enumerate(("first", "last")))
                    with T.If(first < last), T.Then():
                        own = named("own", T.alloc_buffer((DIMENSIONS,), "float32"))
                        best = named("best", T.alloc_buffer((1,), "float32"))
                        request.key(i, own, [])
                        T.buffer_store(best, T.infinity("float32"), [0])
                        T.buffer_store(number, order[first], [i])  # also where keys are no numbers
                        with T.serial(last - first) as j:
                            record = T.Bind(order[first + j])
                            far = T.Bind(_squared_distance(isa, own, [], keys, [record]))
                            with T.If(far < best[0]), T.Then():
                                T.buffer_store(best, far, [0])
                                T.buffer_store(number, record, [i])
                        request.compare(i, words, T.Bind(entries[number[i], 0] // 4), distance)
        return builder.get()


class _Request:
    """The parameters that say what requests are, and what is computed of one."""

    def __init__(self, isa: Isa) -> None:
        tokens, self.count = named("tokens", T.int64()), named("requests", T.int64())
        vocabulary, places = named("vocabulary", T.int64()), named("places", T.int64())
        self.isa = isa
        self.tokens = parameter("ids", (2, tokens), "int32")
        self.segments = parameter("segments", (self.count, 2), "int32")
        self.vectors = parameter("vectors", (vocabulary, DIMENSIONS), "float32")
        self.signs = parameter("signs", (places, DIMENSIONS), "int8")

    def key(self, i: Any, out: Any, at: list[Any]) -> None:
        """Write the key of request ``i`` to the row ``at`` of a buffer."""
        start, length = self.segments[i, 0], self.segments[i, 1]
        columns = _columns(self.isa)
        sums = [self.isa.register("float32") for _ in columns]
        for total in sums:
            T.buffer_store(total, splat(0.0, self.isa.lanes), [0])
        with T.serial(length) as place:
            word = T.Bind(self.tokens[0, start + place])
            odd = T.Bind(T.cast(1 - 2 * (self.tokens[1, start + place] % 2), "float32"))
            for total, column in zip(sums, columns, strict=True):
                sign = T.cast(self.signs[place, column], f"float32x{self.isa.lanes}") * splat(odd, self.isa.lanes)
                T.buffer_store(total, fma(self.vectors[word, column], sign, total[0]), [0])
        share = T.Bind(splat(T.float32(1) / T.sqrt(T.cast(length, "float32")), self.isa.lanes))
        for total, column in zip(sums, columns, strict=True):
            T.buffer_store(out, total[0] * share, [*at, column])

    def compare(self, i: Any, words: Any, at: Any, distance: Any) -> None:
        """Write the distance of request ``i`` and the one whose tokens begin ``at`` a word."""
        start, length = self.segments[i, 0], self.segments[i, 1]
        total, types = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "int32")
        differing = T.alloc_buffer((1,), "int32")
        T.buffer_store(total, T.float32(0), [0])
        for count in (types, differing):
            T.buffer_store(count, T.int32(0), [0])
        with T.serial(length) as place:
            one, other = T.Bind(self.tokens[0, start + place]), T.Bind(words[at + place])
            known = T.Bind(T.max(T.min(other, T.cast(self.vectors.shape[0], "int32") - 1), 0))  # of a damaged file too
            kind = words[at + length + place]
            T.buffer_store(types, types[0] | (self.tokens[1, start + place] ^ kind), [0])
            with T.If(one != other), T.Then():
                T.buffer_store(differing, T.int32(1), [0])
                more = _squared_distance(self.isa, self.vectors, [one], self.vectors, [known])
                T.buffer_store(total, total[0] + more, [0])
        mean = T.sqrt(total[0] / T.cast(length, "float32"))
        of_words = T.Select(differing[0] == 0, T.float32(0), T.max(mean, T.float32(_LEAST)))
        T.buffer_store(distance, T.Select(types[0] == 0, of_words, T.infinity("float32")), [i])


def _columns(isa: Isa) -> list[Any]:
    return [T.ramp(first, 1, isa.lanes) for first in range(0, DIMENSIONS, isa.lanes)]


def _squared_distance(isa: Isa, a: Any, at: list[Any], b: Any, bt: list[Any]) -> Any:
    """Of two rows, summed in an order that is the same on every instruction set."""
    sums: list[Any] = [None] * isa.parts
    for i, column in enumerate(_columns(isa)):
        difference = T.Bind(a[(*at, column)] - b[(*bt, column)])
        before = sums[i % isa.parts]
        sums[i % isa.parts] = T.Bind(difference * difference if before is None else fma(difference, difference, before))
    total = sums[0] if isa.parts == 1 else T.Bind(sums[0] + sums[1])
    for half in (8, 4, 2, 1)[isa.parts - 1 :]:
        low, high = (tirx.Shuffle([total], [T.int32(first + i) for i in range(half)]) for first in (0, half))
        total = T.Bind(low + high)
    return total
