"""What a cache after a layer says of each request: an answer, and how far to trust it.

One request at a time: the mean of its tokens, standardised, times int8 rows, which are the hidden units of a perceptron
or the centroids of clusters. A request is one vector, so the rows are the vector lanes and nothing is computed for the
empty columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, fma, splat
from whet.schedules.pool import mean_of_channel, mean_of_channels
from whet.schedules.vector_math import exp

Kind: TypeAlias = Literal["perceptron", "clusters"]

_AT_ONCE = 4
"""Rows are multiplied so many times 16 at once: 8 sums in flight on 256 bits."""
_LOWEST = -1e30
"""Score of a row that is there to fill the last vector."""


@dataclass(frozen=True)
class LookupSpec:
    """The lookup of all requests in one cache.

    Arguments: x ``(nt, C, 16)`` float32, segments ``(ng, 16, 2)`` int32; scale and shift ``(C,)`` float32, so that a
    request is ``z = mean · scale + shift``; rows int8 and row_scale and row_bias float32, as ``pack_rows`` gives them,
    so that its scores are ``rows · z · row_scale + row_bias``; three more arrays; outputs: answer ``(ng, outputs, 16)``
    and trust ``(ng, 16)`` float32, where unused entries are not written.

    perceptron: scores above 0 are its hidden units; the answer is a second three of packed rows, scales and biases
    times these, the trust the difference of its two largest softmax probabilities (1 of a single output). clusters: a
    score is ``z · c − |c|² / 2``, so that the largest belongs to the nearest centroid c; then come answers
    ``(rows, outputs)`` int8, answer_scale ``(rows,)`` and inverse_reach ``(rows,)`` float32: the answer is c's row of
    answers, the trust ``1 − |z − c|² · inverse_reach``.
    """

    channels: int
    rows: int
    outputs: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")


def blocks_of(rows: int) -> tuple[int, int]:
    """Blocks of rows, and vectors of 16 in each, as few more than there are rows as it goes."""
    vectors = -(-rows // TILE)
    blocks = -(-vectors // _AT_ONCE)
    return blocks, -(-vectors // blocks)


def padded(rows: int) -> int:
    """Rows with those that fill the last block."""
    blocks, vectors = blocks_of(rows)
    return blocks * vectors * TILE


def pack_rows(rows: NDArray[np.int8], scale: Any, bias: Any) -> list[NDArray[Any]]:
    """Rows ``(rows, C)``, and scale and bias ``(rows,)``, as the kernel takes them."""
    blocks, vectors = blocks_of(len(rows))
    more = padded(len(rows)) - len(rows)
    filled = np.pad(rows, ((0, more), (0, 0))).reshape(blocks, vectors, TILE, rows.shape[1])
    return [
        np.ascontiguousarray(filled.transpose(0, 3, 1, 2)),
        np.pad(np.asarray(scale, np.float32), (0, more)),
        np.pad(np.asarray(bias, np.float32), (0, more), constant_values=_LOWEST),
    ]


def lookup(spec: LookupSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel for the lookup, parallel over requests; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("lookup")
            tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            scale = parameter("scale", (spec.channels,), "float32")
            shift = parameter("shift", (spec.channels,), "float32")
            rows = _declare_rows("row", spec.rows, spec.channels)
            table = _declare_table(spec) if spec.kind == "clusters" else _declare_rows("out", spec.outputs, spec.rows)
            answer = parameter("answer", (groups, spec.outputs, TILE), "float32")
            trust = parameter("trust", (groups, TILE), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(groups * TILE) as request:
                    group, column = T.Bind(request // TILE), T.Bind(request % TILE)
                    tokens = tuple(
                        named(n, T.Bind(segments[group, column, i])) for i, n in enumerate(("start", "length"))
                    )
                    with T.If(tokens[1] > 0), T.Then():
                        z = named("z", T.alloc_buffer((spec.channels,), "float32"))
                        scores = named("scores", T.alloc_buffer((padded(spec.rows),), "float32"))
                        _standardise(spec, isa, (x, tokens), (scale, shift), z)
                        _score(isa, z, rows, scores)
                        _TAILS[spec.kind](spec, isa, (z, scores, table), (answer, trust), (group, column))
        return builder.get()


def _declare_rows(name: str, rows: int, channels: int) -> tuple[Any, Any, Any]:
    """Parameters for what ``pack_rows`` gives."""
    blocks, vectors = blocks_of(rows)
    return (
        parameter(f"{name}s", (blocks, channels, vectors, TILE), "int8"),
        parameter(f"{name}_scale", (padded(rows),), "float32"),
        parameter(f"{name}_bias", (padded(rows),), "float32"),
    )


def _declare_table(spec: LookupSpec) -> tuple[Any, Any, Any]:
    return (
        parameter("answers", (spec.rows, spec.outputs), "int8"),
        parameter("answer_scale", (spec.rows,), "float32"),
        parameter("inverse_reach", (spec.rows,), "float32"),
    )


def _standardise(spec: LookupSpec, isa: Isa, request: tuple[Any, Any], by: tuple[Any, Any], z: Any) -> None:
    """Write the mean of the request's tokens, scaled and shifted."""
    x, tokens = request
    scale, shift = by
    whole, rest = divmod(spec.channels, isa.lanes)
    with T.serial(whole) as i:
        at = T.ramp(i * isa.lanes, 1, isa.lanes)
        T.buffer_store(z, fma(mean_of_channels(isa, x, tokens, i * isa.lanes), scale[at], shift[at]), [at])
    if rest:
        with T.serial(rest) as i:
            c = whole * isa.lanes + i
            T.buffer_store(z, fma(mean_of_channel(x, tokens, c), scale[c], shift[c]), [c])


def _score(isa: Isa, z: Any, weights: tuple[Any, Any, Any], scores: Any) -> None:
    """Write the rows times z, every sum in the order of the channels."""
    rows, row_scale, row_bias = weights
    blocks, channels, vectors, _ = (int(n) for n in rows.shape)
    count = vectors * isa.parts
    with T.serial(blocks) as block:
        sums = [isa.register("float32") for _ in range(count)]
        for register in sums:
            T.buffer_store(register, splat(0.0, isa.lanes), [0])
        with T.serial(channels) as c:
            value = T.Bind(splat(z[c], isa.lanes))
            for i, register in enumerate(sums):
                vector, part = divmod(i, isa.parts)
                row = T.cast(rows[block, c, vector, T.ramp(part * isa.lanes, 1, isa.lanes)], f"float32x{isa.lanes}")
                T.buffer_store(register, fma(row, value, register[0]), [0])
        for i, register in enumerate(sums):
            at = T.ramp(block * (vectors * TILE) + i * isa.lanes, 1, isa.lanes)
            T.buffer_store(scores, fma(register[0], row_scale[at], row_bias[at]), [at])


def _classify(spec: LookupSpec, isa: Isa, what: tuple[Any, ...], out: tuple[Any, Any], to: tuple[Any, Any]) -> None:
    _, hidden, weights = what
    answer, trust = out
    with T.serial(padded(spec.rows) // isa.lanes) as i:
        at = T.ramp(i * isa.lanes, 1, isa.lanes)
        T.buffer_store(hidden, T.max(hidden[at], splat(0.0, isa.lanes)), [at])
    scores = named("logits", T.alloc_buffer((padded(spec.outputs),), "float32"))
    _score(isa, hidden, weights, scores)
    largest, second = _two_largest(spec.outputs, isa, scores)
    above = splat(largest, isa.lanes)
    total = _reduce(spec.outputs, isa, lambda at: exp(scores[at] - above, isa.lanes), lambda a, b: a + b)
    # The largest probability is 1 / total, the next exp(second - largest) / total.
    ratio = named("ratio", T.alloc_buffer((isa.lanes,), "float32"))
    T.buffer_store(ratio, exp(splat(second, isa.lanes) - above, isa.lanes), [T.ramp(0, 1, isa.lanes)])
    T.buffer_store(trust, (T.float32(1) - ratio[0]) / total, list(to))
    _scatter(spec, lambda o: scores[o], answer, to)


def _nearest(spec: LookupSpec, isa: Isa, what: tuple[Any, ...], out: tuple[Any, Any], to: tuple[Any, Any]) -> None:
    z, scores, (answers, answer_scale, inverse_reach) = what
    answer, trust = out
    largest = _reduce(spec.rows, isa, lambda at: scores[at], T.max)
    best, square = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "float32")
    T.buffer_store(best, T.int32(0), [0])
    with T.serial(spec.rows) as i:  # from the end: of equals the first is taken
        row = T.cast(spec.rows - 1 - i, "int32")
        T.buffer_store(best, T.Select(scores[row] == largest, row, best[0]), [0])
    T.buffer_store(square, T.float32(0), [0])
    with T.serial(spec.channels) as c:
        T.buffer_store(square, fma(z[c], z[c], square[0]), [0])
    cluster = named("cluster", T.Bind(best[0]))
    distance = T.max(fma(T.float32(-2), largest, square[0]), T.float32(0))
    T.buffer_store(trust, fma(-distance, inverse_reach[cluster], T.float32(1)), list(to))
    _scatter(spec, lambda o: T.cast(answers[cluster, o], "float32") * answer_scale[cluster], answer, to)


_TAILS: dict[str, Callable[..., None]] = {"perceptron": _classify, "clusters": _nearest}


def _reduce(rows: int, isa: Isa, values: Callable[[Any], Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce over all rows, in an order that is the same on every instruction set."""
    partial = T.alloc_buffer((TILE,), "float32")
    with T.serial(isa.parts) as part:
        register = isa.register("float32")
        T.buffer_store(register, values(T.ramp(part * isa.lanes, 1, isa.lanes)), [0])
        with T.serial(padded(rows) // TILE - 1) as i:
            at = T.ramp((i + 1) * TILE + part * isa.lanes, 1, isa.lanes)
            T.buffer_store(register, combine(register[0], values(at)), [0])
        T.buffer_store(partial, register[0], [T.ramp(part * isa.lanes, 1, isa.lanes)])
    result = partial[0]
    for i in range(1, TILE):
        result = combine(result, partial[i])
    return T.Bind(result)


def _two_largest(rows: int, isa: Isa, scores: Any) -> tuple[Any, Any]:
    """The largest score and the next, which is the same if two rows have it."""
    partial = T.alloc_buffer((2, TILE), "float32")
    with T.serial(isa.parts) as part:
        first, second = isa.register("float32"), isa.register("float32")
        lanes = T.ramp(part * isa.lanes, 1, isa.lanes)
        T.buffer_store(first, scores[lanes], [0])
        T.buffer_store(second, splat(_LOWEST, isa.lanes), [0])
        with T.serial(padded(rows) // TILE - 1) as i:
            score = T.Bind(scores[T.ramp((i + 1) * TILE + part * isa.lanes, 1, isa.lanes)])
            T.buffer_store(second, T.max(second[0], T.min(first[0], score)), [0])
            T.buffer_store(first, T.max(first[0], score), [0])
        for i, register in enumerate((first, second)):
            T.buffer_store(partial, register[0], [i, lanes])
    largest, next_one = partial[0, 0], partial[1, 0]
    for i in range(1, TILE):
        score = T.Bind(partial[0, i])
        next_one = T.Bind(T.max(T.max(next_one, partial[1, i]), T.min(largest, score)))
        largest = T.Bind(T.max(largest, score))
    return largest, next_one


def _scatter(spec: LookupSpec, value: Callable[[Any], Any], answer: Any, to: tuple[Any, Any]) -> None:
    """Write one column of the answer."""
    group, column = to
    with T.serial(spec.outputs) as o:
        T.buffer_store(answer, value(o), [group, o, column])
