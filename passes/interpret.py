"""Runs an encoder-dialect graph in NumPy, float32: what every op means, the oracle of compiled models.

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

from .dialect import PREFIX

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
    types = np.zeros_like(ids) if token_types is None else np.concatenate([np.asarray(t, np.int32) for t in token_types])
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return Packed(ids, positions, types, [(int(s), n) for s, n in zip(starts, lengths, strict=True)])


def interpret(
    module: tvm.IRModule,
    ids_list: Sequence[Ids],
    token_types: Sequence[Ids] | None = None,
    observe: Callable[[str, Rows], None] | None = None,
) -> Rows:
    """Run ``module["main"]`` on requests of 1-D token ids; returns rows ``(tokens, C)`` or ``(requests, C)``.

    ``observe(name, rows)`` is called for the value of every variable as it is computed, several times per variable:
    once for each chunk of requests. Raises ValueError for ids outside a table and for ops outside the dialect.
    """
    if not ids_list:
        raise ValueError("ids_list is empty; expected at least one request")
    graph = _Graph(module["main"])
    outputs = []
    for first, last in _chunks([len(ids) for ids in ids_list]):
        types = None if token_types is None else token_types[first:last]
        outputs.append(graph.run(pack_requests(ids_list[first:last], types), observe))
    return np.concatenate(outputs)


def _chunks(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = tokens = 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > CHUNK_TOKENS:
            yield first, i
            first, tokens = i, 0
        tokens += length
    yield first, len(lengths)


class _Graph:
    """The bindings of one function, with everything that depends on constants alone computed once."""

    def __init__(self, function: relax.Function) -> None:
        self.params = list(function.params)
        if len(self.params) != 4:
            raise ValueError(f"main has {len(self.params)} parameters; expected ids, positions, token_types, segments")
        self.result: relax.Expr = function.body.body
        self.constants: dict[Any, Any] = {}
        self.steps: list[tuple[relax.Var, relax.Expr]] = []
        for block in function.body.blocks:
            for binding in block.bindings:
                self._add(binding.var, binding.value)
        self.last_use = {arg: i for i, (_, value) in enumerate(self.steps) for arg in _arguments(value)}

    def _add(self, var: relax.Var, value: relax.Expr) -> None:
        arguments = _arguments(value)
        for arg in arguments:
            if isinstance(arg, relax.Constant):
                self.constants[arg] = arg.value.numpy()
        if all(arg in self.constants for arg in arguments):
            self.constants[var] = _evaluate(value, self.constants)
        else:
            self.steps.append((var, value))

    def run(self, batch: Packed, observe: Callable[[str, Rows], None] | None) -> Rows:
        inputs = (batch.ids, batch.positions, batch.token_types, batch.segments)
        values: dict[Any, Any] = {**self.constants, **dict(zip(self.params, inputs, strict=True))}
        for i, (var, value) in enumerate(self.steps):
            rows = values[var] = _evaluate(value, values)
            if observe is not None:
                observe(var.name, rows)
            for arg in _arguments(value):
                if self.last_use[arg] == i and arg is not self.result:
                    values.pop(arg, None)
        result: Rows = values[self.result]
        return result


def _arguments(value: relax.Expr) -> list[relax.Expr]:
    if isinstance(value, relax.Call):
        return list(value.args)
    return [value]


def _evaluate(value: relax.Expr, values: Mapping[Any, Any]) -> Any:
    if not isinstance(value, relax.Call):
        return values[value]
    name = str(getattr(value.op, "name", value.op)).removeprefix(PREFIX)
    if name not in _OPS:
        raise ValueError(f"{name} is not an op of the encoder dialect; known: {', '.join(_OPS)}")
    attrs = {} if value.attrs is None else {key: value.attrs[key] for key in value.attrs.keys()}
    return _OPS[name](*(values[arg] for arg in value.args), **attrs)


def _embed(
    ids: Ids, positions: Ids, token_types: Ids, word: Rows, position: Rows, token_type: Rows, gamma: Rows, beta: Rows,
    *, eps: float,
) -> Rows:
    total = _lookup("token id", ids, word) + _lookup("position", positions, position)
    total += _lookup("token type", token_types, token_type)
    return _layer_norm(total, gamma, beta, eps=eps)


def _lookup(what: str, indices: Ids, table: Rows) -> Rows:
    bad = indices[(indices < 0) | (indices >= len(table))]
    if bad.size:
        raise ValueError(f"{what} {bad[0]} is outside the table of {len(table)} rows")
    return table[indices]


def _dense(x: Rows, weight: Rows, bias: Rows, *, activation: str) -> Rows:
    return _activate(x @ weight.T + bias, kind=activation)


def _layer_norm(x: Rows, gamma: Rows, beta: Rows, *, eps: float) -> Rows:
    centred = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * gamma + beta


def _attention(
    q: Rows, k: Rows, v: Rows, segments: list[tuple[int, int]], *, heads: int, scale: float
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
        scores /= scores.sum(axis=-1, keepdims=True)
        out[rows] = (scores @ value).transpose(1, 0, 2).reshape(length, -1)
    return out


def _activate(x: Rows, *, kind: str) -> Rows:
    match kind:
        case "none":
            return x
        case "relu":
            return np.maximum(x, np.float32(0))
        case "tanh":
            return np.tanh(x)
        case "gelu":
            return x * (np.float32(0.5) + np.float32(0.5) * _erf(x * np.float32(math.sqrt(0.5))))
        case "gelu_tanh":
            inner = np.float32(math.sqrt(2 / math.pi)) * x * (1 + np.float32(0.044715) * x * x)
            return np.float32(0.5) * x * (1 + np.tanh(inner))
        case _:
            raise ValueError(f"activation {kind!r} is not known")


def _erf(x: Rows) -> Rows:
    """Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7 (NumPy has no erf)."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * magnitude)
    polynomial = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial *= t
        polynomial += np.float32(coefficient)
    return np.copysign(1 - polynomial * t * np.exp(-magnitude * magnitude), x)


def _add(x: Rows, y: Rows) -> Rows:
    return x + y


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
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def _quantized_weight(values: npt.NDArray[np.int8], scale: Rows) -> Rows:
    return values.astype(np.float32) * scale[:, None]


_OPS: dict[str, Callable[..., Rows]] = {
    "embed": _embed,
    "dense": _dense,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "activate": _activate,
    "add": _add,
    "pool": _pool,
    "normalize": _normalize,
    "quantized_weight": _quantized_weight,
}
