"""Runs an encoder-dialect graph in NumPy, float32: what every op means, the oracle of compiled models.

What ``quantise`` notes on an op (scales, zero points) says how a kernel computes it, not what it means: ignored here.

Inside, a tiles value is rows: ``(tokens, channels)``, one row per token of the packed batch, or one per request after
pooling. Calibration watches the rows through ``observe``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst

from whet.caching.cache import look_up
from whet.schedules import bfloat16

from .dialect import PREFIX
from .graph import Graph, arguments, attributes

Rows: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[Any]

CHUNK_TOKENS = 1024
"""Requests are taken together up to so many tokens: enough for fast matrix products, and little memory."""


@dataclass(frozen=True)
class Packed:
    """Requests one after the other: int32 ``(tokens,)`` each, and the ``(start, length)`` of every request."""

    ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.int32]
    segments: list[tuple[int, int]]


def pack_requests(ids_list: Sequence[Ids], token_types: Sequence[Ids] | None = None) -> Packed:
    """Concatenate requests of 1-D token ids; positions count from 0 in each, token types are 0 where not given."""
    lengths = [len(ids) for ids in ids_list]
    if token_types is not None and [len(types) for types in token_types] != lengths:
        raise ValueError("token_types must have the same lengths as ids_list")
    starts = np.cumsum([0, *lengths])[:-1]
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in ids_list])
    types = (
        np.zeros_like(ids) if token_types is None else np.concatenate([np.asarray(t, np.int32) for t in token_types])
    )
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return Packed(ids, positions, types, [(int(s), n) for s, n in zip(starts, lengths, strict=True)])


class Staying(list[tuple[int, int]]):
    """The ``(start, length)`` of requests that did not leave; ``requests`` are their numbers, ``tokens`` their rows."""

    def __init__(self, lengths: Sequence[int], requests: Ids, tokens: Ids) -> None:
        super().__init__(zip(np.cumsum([0, *lengths])[:-1].tolist(), lengths, strict=True))
        self.requests = requests
        self.tokens = tokens


def interpret(
    module: tvm.IRModule,
    ids_list: Sequence[Ids],
    token_types: Sequence[Ids] | None = None,
    observe: Callable[[str, Rows], None] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Rows:
    """Run ``module["main"]`` on requests of 1-D token ids; returns rows ``(tokens, C)`` or ``(requests, C)``.

    ``observe(name, rows)`` is called for the result of every op as it is computed, several times per variable:
    once for each chunk of requests, of at most ``chunk_tokens`` tokens where there are several. It may change the rows
    in place: later ops see that. Raises ValueError for ids outside a table and for ops outside the dialect.
    """
    if not ids_list:
        raise ValueError("ids_list is empty; expected at least one request")
    program = _Program(Graph(module))
    outputs = []
    for first, last in _chunks([len(ids) for ids in ids_list], chunk_tokens):
        types = None if token_types is None else token_types[first:last]
        outputs.append(program.run(pack_requests(ids_list[first:last], types), observe))
    return np.concatenate(outputs)


def _chunks(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    first = tokens = 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > most:
            yield first, i
            first, tokens = i, 0
        tokens += length
    yield first, len(lengths)


class _Program:
    """The bindings of one function, with everything that depends on constants alone computed once."""

    def __init__(self, graph: Graph) -> None:
        if len(graph.params) not in (4, 5):
            raise ValueError(
                f"main has {len(graph.params)} parameters; expected ids, positions, token_types, segments and maybe "
                "records"
            )
        self.params = graph.params
        self.result = graph.result
        self.constants: dict[Any, Any] = {}
        self.steps: list[tuple[relax.Var, relax.Expr]] = []
        for binding in graph.bindings:
            self._add(graph, binding.var, binding.value)
        self.last_use = {arg: i for i, (_, value) in enumerate(self.steps) for arg in arguments(value)}

    def _add(self, graph: Graph, var: relax.Var, value: relax.Expr) -> None:
        needed = [value] if isinstance(value, GenericConst) else arguments(value)
        for arg in needed:
            if isinstance(arg, GenericConst) and arg not in self.constants:
                self.constants[arg] = graph.constant(arg)
        if all(arg in self.constants for arg in needed):
            self.constants[var] = _evaluate(value, self.constants)
        else:
            self.steps.append((var, value))

    def run(self, batch: Packed, observe: Callable[[str, Rows], None] | None) -> Rows:
        inputs = (batch.ids, batch.positions, batch.token_types, batch.segments, None)
        values: dict[Any, Any] = {**self.constants, **dict(zip(self.params, inputs, strict=False))}
        for i, (var, value) in enumerate(self.steps):
            values[var] = _evaluate(value, values)
            if observe is not None and isinstance(value, relax.Call):
                observe(var.name, values[var])
            for arg in set(arguments(value)):
                if self.last_use[arg] == i and arg is not self.result:
                    del values[arg]
        result: Rows = values[self.result]
        return result


def _evaluate(value: relax.Expr, values: Mapping[Any, Any]) -> Any:
    if not isinstance(value, relax.Call):
        return values[value]
    name = str(getattr(value.op, "name", value.op)).removeprefix(PREFIX)
    if name not in _OPS:
        raise ValueError(f"{name} is not an op of the encoder dialect; known: {', '.join(_OPS)}")
    return _OPS[name](*(values[arg] for arg in value.args), **attributes(value))


def _embed(
    ids: Ids,
    positions: Ids,
    token_types: Ids,
    word: Rows,
    position: Rows,
    token_type: Rows,
    gamma: Rows,
    beta: Rows,
    *,
    eps: float,
) -> Rows:
    total = _rows_of("token id", ids, word) + _rows_of("position", positions, position)
    total += _rows_of("token type", token_types, token_type)
    return _layer_norm(total, gamma, beta, eps=eps)


def _rows_of(what: str, indices: Ids, table: Rows) -> Rows:
    bad = indices[(indices < 0) | (indices >= len(table))]
    if bad.size:
        raise ValueError(f"{what} {bad[0]} is outside the table of {len(table)} rows")
    rows: Rows = table[indices]
    return rows


def _dense(
    x: Rows,
    weight: Rows,
    bias: Rows,
    residual: Rows | None = None,
    *,
    activation: str,
    x_scale: float | None = None,
    x_zero: int = 0,
    per_token: bool = False,
    bf16: bool = False,
    **_choice: Any,
) -> Rows:
    if bf16:
        x, weight = bfloat16.rounded(x), bfloat16.rounded(weight)
    elif per_token:
        low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        scale = np.maximum((high - low) / 255, 1e-8)
        x = _rounded(x, scale, np.rint(-low / scale), 0, 255)
    elif x_scale is not None:
        x = _rounded(x, x_scale, x_zero, 0, 255)
    y = _activate(x @ weight.T + bias, kind=activation)
    return y if residual is None else y + residual


def _rounded(x: Rows, scale: Any, zero: Any, low: int, high: int) -> Rows:
    """What is left of ``x`` after it was an integer of this scale and zero point."""
    rounded: Rows = (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale
    return rounded.astype(np.float32)


def _layer_norm(x: Rows, gamma: Rows, beta: Rows, *, eps: float) -> Rows:
    centred = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    normal: Rows = (centred / np.sqrt(variance + np.float32(eps))).astype(np.float32, copy=False)
    return normal * gamma + beta


def _attention(
    q: Rows,
    k: Rows,
    v: Rows,
    segments: list[tuple[int, int]],
    *,
    heads: int,
    scale: float,
    integer: bool = False,
    bf16: bool = False,
) -> Rows:
    out = np.empty_like(v)
    for start, length in segments:
        if not length:
            continue
        rows = slice(start, start + length)
        query, key, value = (x[rows].reshape(length, heads, -1).transpose(1, 0, 2) for x in (q, k, v))
        scores = (query @ key.transpose(0, 2, 1)) * np.float32(scale)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        if integer:
            np.rint(scores * 255, out=scores)
        if bf16:
            scores = bfloat16.rounded(scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out[rows] = (scores @ value).transpose(1, 0, 2).reshape(length, -1)
    return out


def _self_attention(
    qkv: Rows,
    segments: list[tuple[int, int]],
    *,
    heads: int,
    scale: float,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    bf16: bool = False,
    first_only: bool = False,
) -> Rows:
    if bf16:
        qkv = bfloat16.rounded(qkv)
    q, k, v = np.split(qkv, 3, axis=1)
    if q_scale is not None:
        q = _rounded(q, q_scale, 128, 0, 255)
        k = _rounded(k, k_scale, 0, -128, 127)
        v = _rounded(v, v_scale, 0, -128, 127)
    out = _attention(q, k, v, segments, heads=heads, scale=scale, integer=q_scale is not None, bf16=bf16)
    if first_only:
        others = np.setdiff1d(np.arange(len(out)), [start for start, _ in segments])
        out[others] = np.nan  # nothing may read them
    return out


def _stack(*values: Rows) -> Rows:
    return np.concatenate(values, axis=1)


def _activate(x: Rows, *, kind: str) -> Rows:
    match kind:
        case "none":
            return x
        case "relu":
            return np.maximum(x, np.float32(0))
        case "tanh":
            return _tanh(x)
        case "gelu":
            return x * (np.float32(0.5) + np.float32(0.5) * _erf(x * np.float32(math.sqrt(0.5))))
        case "gelu_tanh":
            inner = np.float32(math.sqrt(2 / math.pi)) * x * (1 + np.float32(0.044715) * x * x)
            return np.float32(0.5) * x * (1 + _tanh(inner))
        case _:
            raise ValueError(f"activation {kind!r} is not known")


def _tanh(x: Rows) -> Rows:
    y: Rows = np.tanh(x)
    return y


def _erf(x: Rows) -> Rows:
    """Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7 (NumPy has no erf)."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * magnitude)
    polynomial = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial *= t
        polynomial += np.float32(coefficient)
    return np.asarray(np.copysign(1 - polynomial * t * np.exp(-magnitude * magnitude), x))


def _add(x: Rows, y: Rows) -> Rows:
    return x + y


def _scale_channels(x: Rows, factors: Rows) -> Rows:
    return x * factors


def _pool(x: Rows, segments: list[tuple[int, int]], *, mode: str) -> Rows:
    reduce: dict[str, Callable[[Rows], Rows]] = {
        "mean": lambda rows: rows.mean(axis=0),
        "cls": lambda rows: rows[0],
        "max": lambda rows: rows.max(axis=0),
    }
    out = np.zeros((len(segments), x.shape[1]), np.float32)
    for i, (start, length) in enumerate(segments):
        if length:
            out[i] = reduce[mode](x[start : start + length])
    return out


def _normalize(x: Rows) -> Rows:
    norm: Rows = np.maximum(np.sqrt(np.square(x).sum(axis=1, keepdims=True)), np.float32(1e-12))
    return x / norm


class Answers(np.ndarray[Any, Any]):
    """Rows that ``lookup`` gives, and how far each is trusted."""

    trust: Rows


def _look_up(x: Rows, segments: list[tuple[int, int]], *cache: Any, kind: str) -> Answers:
    answers, trust = look_up(_pool(x, segments, mode="mean"), *cache, kind=kind)
    found = answers.view(Answers)
    found.trust = trust
    return found


def _stay(answers: Answers, segments: list[tuple[int, int]], exits: Rows, *, number: int, **_sizes: Any) -> Staying:
    staying = np.flatnonzero(answers.trust < exits[1, number])
    numbers = segments.requests if isinstance(segments, Staying) else np.arange(len(segments))
    spans = [segments[i] for i in staying]
    tokens = [np.arange(start, start + length) for start, length in spans]
    return Staying([length for _, length in spans], numbers[staying], np.concatenate([*tokens, np.empty(0, np.int64)]))


def _move(x: Rows, segments: Staying, **_sizes: Any) -> Rows:
    moved: Rows = x[segments.tokens.astype(np.int64)]
    return moved


def _settle(first: Answers, *later: Any, layers: Sequence[int]) -> Rows:
    def with_source(answers: Rows, layer: int) -> Rows:
        trust = answers.trust if isinstance(answers, Answers) else np.ones(len(answers), np.float32)
        return np.column_stack([answers, np.full(len(answers), layer), trust]).astype(np.float32)

    out = with_source(first, layers[0])
    for some, segments, layer in zip(later[::2], later[1::2], layers[1:], strict=True):
        out[segments.requests] = with_source(some, layer)
    return out


def _follow(records: None, _segments: Staying) -> None:
    return records


def _divide(segments: list[tuple[int, int]], _records: None, *, stored: bool, **_sizes: Any) -> list[tuple[int, int]]:
    """Nobody has a record here."""
    return [] if stored else segments


def _part(x: Rows, *, last: bool, **_sizes: Any) -> Rows:
    return x[:0] if last else x


def _memoized_attention(
    qkv: Rows,
    computed: list[tuple[int, int]],
    _v: Rows,
    _stored: list[tuple[int, int]],
    _records: None,
    *,
    tiles: Any,
    layer: int,
    **attrs: Any,
) -> Rows:
    return _self_attention(qkv, computed, **attrs)


def _quantized_weight(values: npt.NDArray[np.int8], scale: Rows) -> Rows:
    return values.astype(np.float32) * scale[:, None]


_OPS: dict[str, Callable[..., Any]] = {
    "embed": _embed,
    "dense": _dense,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "self_attention": _self_attention,
    "stack": _stack,
    "activate": _activate,
    "add": _add,
    "scale_channels": _scale_channels,
    "pool": _pool,
    "normalize": _normalize,
    "lookup": _look_up,
    "stay": _stay,
    "move": _move,
    "settle": _settle,
    "follow": _follow,
    "divide": _divide,
    "part": _part,
    "memoized_attention": _memoized_attention,
    "quantized_weight": _quantized_weight,
}
