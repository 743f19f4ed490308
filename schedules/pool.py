"""One column per request: mean or maximum over its tokens; and the division of columns by their norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import lanes_of
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, fma, splat
from whet.schedules.layer_norm import sum_rows
from whet.schedules.tiles import transpose

Combine: TypeAlias = Callable[[Any, Any], Any]

_LOWEST = -3.4028234663852886e38
_SMALLEST_NORM = 1e-12
_MODES = ("mean", "max")


@dataclass(frozen=True)
class PoolSpec:
    """Pooling: arguments x ``(nt, C, 16)`` float32, segments ``(ng, 16, 2)`` int32, out ``(ng, C, 16)`` float32.

    ``mode`` is mean or max. Entries of length 0 give 0. Tokens are added one after the other, so that the result of a
    request does not depend on where in a tile it starts.
    """

    channels: int
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode is {self.mode!r}; expected one of {', '.join(_MODES)}")


@dataclass(frozen=True)
class NormalizeSpec:
    """Division of each column by its Euclidean norm (at least 1e-12): arguments x, out ``(nt, C, 16)`` float32."""

    channels: int


def pool(spec: PoolSpec, isa: Isa) -> tirx.PrimFunc:
    """Pooling kernel, parallel over requests; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("pool")
            tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            out = parameter("out", (groups, spec.channels, TILE), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(groups * TILE) as request:
                    group, column = T.Bind(request // TILE), T.Bind(request % TILE)
                    start = named("start", T.Bind(segments[group, column, 0]))
                    length = named("length", T.Bind(segments[group, column, 1]))
                    _reduce(spec, isa, x, (start, length), out, (group, column))
        return builder.get()


def _reduce(spec: PoolSpec, isa: Isa, x: Any, tokens: tuple[Any, Any], out: Any, request: tuple[Any, Any]) -> None:
    whole, rest = divmod(spec.channels, isa.lanes)
    vector, scalar = {"mean": (mean_of_channels, mean_of_channel), "max": (_max_of_channels, _max_of_channel)}[
        spec.mode
    ]
    group, column = request

    def store(value: Any, c: Any) -> None:
        T.buffer_store(out, T.Select(tokens[1] > 0, value, T.float32(0)), [group, c, column])

    with T.serial(whole) as i:
        value = T.Bind(vector(isa, x, tokens, i * isa.lanes))
        for j in range(isa.lanes):
            store(tirx.Shuffle([value], [j]), i * isa.lanes + j)
    if rest:
        with T.serial(rest) as i:
            store(scalar(x, tokens, whole * isa.lanes + i), whole * isa.lanes + i)


def mean_of_channels(isa: Isa, x: Any, tokens: tuple[Any, Any], c: Any) -> Any:
    """Mean over the tokens ``(start, length)`` of tiles ``x``, as a vector of the channels from ``c`` on."""
    return _over_tokens(isa, x, tokens, c, 0.0, lambda a, b: a + b) / splat(_divisor(tokens), isa.lanes)


def mean_of_channel(x: Any, tokens: tuple[Any, Any], c: Any) -> Any:
    """The same of one channel."""
    return _of_channel(x, tokens, c, 0.0, lambda a, b: a + b) / _divisor(tokens)


def _max_of_channels(isa: Isa, x: Any, tokens: tuple[Any, Any], c: Any) -> Any:
    return _over_tokens(isa, x, tokens, c, _LOWEST, T.max)


def _max_of_channel(x: Any, tokens: tuple[Any, Any], c: Any) -> Any:
    return _of_channel(x, tokens, c, _LOWEST, T.max)


def _divisor(tokens: tuple[Any, Any]) -> Any:
    return T.cast(T.max(tokens[1], 1), "float32")


def _over_tokens(isa: Isa, x: Any, tokens: tuple[Any, Any], c: Any, neutral: float, combine: Combine) -> Any:
    lanes = isa.lanes
    start, length = tokens
    first = named("first_block", T.Bind(start // lanes))
    blocks = named("blocks", T.Bind((start + length + lanes - 1) // lanes - first))
    result = isa.register("float32")
    T.buffer_store(result, splat(neutral, lanes), [0])
    with T.serial(blocks) as b:
        token = T.Bind((first + b) * lanes)
        at = lanes_of(token % TILE // lanes, isa)
        rows = transpose([T.Bind(x[token // TILE, c + j, at]) for j in range(lanes)])
        for j, row in enumerate(rows):
            inside = tirx.all(token + j >= start, token + j < start + length)
            chosen = T.Select(T.broadcast(inside, lanes), row, splat(neutral, lanes))
            T.buffer_store(result, combine(result[0], chosen), [0])
    return result[0]


def _of_channel(x: Any, tokens: tuple[Any, Any], c: Any, neutral: float, combine: Combine) -> Any:
    start, length = tokens
    result = T.alloc_buffer((1,), "float32")
    T.buffer_store(result, T.float32(neutral), [0])
    with T.serial(length) as j:
        token = start + j
        T.buffer_store(result, combine(result[0], x[token // TILE, c, token % TILE]), [0])
    return result[0]


def normalize(spec: NormalizeSpec, isa: Isa) -> tirx.PrimFunc:
    """Normalisation kernel, parallel over tiles; the arguments are the specification's."""
    lanes = isa.lanes
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("normalize")
            tiles = named("tiles", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            out = parameter("out", (tiles, spec.channels, TILE), "float32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(tiles) as tile, T.serial(isa.parts) as part:
                    at = lanes_of(part, isa)

                    def add_square(s: Any, c: Any) -> Any:
                        value = T.Bind(x[tile, c, at])
                        return fma(value, value, s)

                    norm = T.call_llvm_pure_intrin(
                        f"float32x{lanes}", "llvm.sqrt", sum_rows(spec.channels, add_square, isa)
                    )
                    inverse = T.Bind(splat(1.0, lanes) / T.max(norm, splat(_SMALLEST_NORM, lanes)))
                    with T.serial(spec.channels) as c:
                        T.buffer_store(out, x[tile, c, at] * inverse, [tile, c, at])
        return builder.get()
