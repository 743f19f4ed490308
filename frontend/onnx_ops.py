"""What ONNX's standard float operators mean in terms of whet.passes.raise_rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from whet.passes import raise_facts
from whet.passes.raise_facts import (
    CURVES,
    PROBES,
    Array,
    DontCare,
    Fact,
    Known,
    Laid,
    NotAnEncoder,
    Probabilities,
    Scores,
)

from .onnx_graph import MS, Node
from .onnx_walk import RULES, Rule, Walk

Inputs = list[Fact | None]
R = TypeVar("R", bound=Rule)


def rule(*ops: str) -> Callable[[R], R]:
    """Register a rule for operators; it is not called where everything is known."""

    def register(function: R) -> R:
        def guarded(walk: Walk, node: Node, inputs: Inputs) -> Any:
            if inputs and all(isinstance(x, Known) for x in inputs if x is not None):
                return None
            return function(walk, node, inputs)

        RULES.update(dict.fromkeys(ops, guarded))
        return function

    return register


def for_constants(*ops: str) -> Callable[[R], R]:
    """Register a rule that is called even where everything is known."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def given(inputs: Inputs, place: int) -> Fact:
    """An input that must be there."""
    if place >= len(inputs) or (value := inputs[place]) is None:
        raise NotAnEncoder(f"lacks input {place}")
    return value


def optional(inputs: Inputs, place: int) -> Known | None:
    """A known input that may be left out."""
    value = inputs[place] if place < len(inputs) else None
    if value is not None and not isinstance(value, Known):
        raise NotAnEncoder(f"input {place} depends on hidden states")
    return value


def known(inputs: Inputs, place: int) -> Known:
    """An input that must be there and known."""
    value = optional(inputs, place)
    if value is None:
        raise NotAnEncoder(f"lacks input {place}")
    return value


def scalar(inputs: Inputs, place: int) -> float:
    """A constant number."""
    value: float | None = known(inputs, place).scalar()
    if value is None:
        raise NotAnEncoder(f"input {place} is not a constant number")
    return value


def laid(inputs: Inputs, place: int = 0) -> Laid:
    """An input that is laid out."""
    value = given(inputs, place)
    if not isinstance(value, Laid):
        raise NotAnEncoder(f"input {place} is the scale or zero point of an activation")
    return value


def dims_of(node: Node, inputs: Inputs, name: str = "axes", place: int = 1) -> list[int] | None:
    """Dimensions given as an attribute (older opsets) or as an input."""
    if name in node.attrs:
        return list(node.attrs[name])
    value = optional(inputs, place)
    return None if value is None else [int(d) for d in value.constant(name).reshape(-1)]


# ------------------------------------------------------------------------------------------------------------ structure


@for_constants("Identity")
def _identity(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return given(inputs, 0)


@rule("Cast", "CastLike", "Dropout")
def _same(walk: Walk, node: Node, inputs: Inputs) -> Any:
    return (given(inputs, 0), DontCare())[: len(node.outputs)]


@rule("Shape")
def _shape(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, start, end = laid(inputs), node.attrs.get("start", 0), node.attrs.get("end")
    return Known.of([np.array(x.shape(p)[start:end], np.int64) for p in PROBES])


@rule("Reshape")
def _reshape(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, target = laid(inputs), known(inputs, 1)
    shapes = []
    for p in PROBES:
        shape = [int(d) for d in target.at(p)]
        if not node.attrs.get("allowzero", 0):
            shape = [x.shape(p)[i] if d == 0 else d for i, d in enumerate(shape)]
        if -1 in shape:
            rest = math.prod(d for d in shape if d != -1)
            shape[shape.index(-1)] = math.prod(x.shape(p)) // max(rest, 1)
        shapes.append(tuple(shape))
    return raise_facts.reshape(x, (shapes[0], shapes[1]))


@rule("Flatten")
def _flatten(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, dim = laid(inputs), node.attrs.get("axis", 1)
    shapes = [(math.prod(x.shape(p)[:dim]), math.prod(x.shape(p)[dim:])) for p in PROBES]
    return raise_facts.reshape(x, (shapes[0], shapes[1]))


@for_constants("Transpose")
def _transpose(walk: Walk, node: Node, inputs: Inputs) -> Fact | None:
    x = given(inputs, 0)
    perm = node.attrs.get("perm")
    if isinstance(x, Laid):
        return raise_facts.transpose(x, perm or range(len(x.axes))[::-1])
    return x.transpose(perm) if isinstance(x, Known) and x.fixed else None


@rule("Squeeze")
def _squeeze(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, dims = laid(inputs), dims_of(node, inputs)
    return raise_facts.squeeze(x, [d for d, g in enumerate(x.axes) if not g] if dims is None else dims)


@rule("Unsqueeze")
def _unsqueeze(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return raise_facts.unsqueeze(laid(inputs), dims_of(node, inputs) or [])


@rule("Expand")
def _expand(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, target = laid(inputs), known(inputs, 1)
    shapes = [np.broadcast_shapes(x.shape(p), tuple(int(d) for d in target.at(p))) for p in PROBES]
    return walk.rules.expand(x, (shapes[0], shapes[1]))


@for_constants("Gather")
def _gather(walk: Walk, node: Node, inputs: Inputs) -> Fact | None:
    x, index, dim = given(inputs, 0), known(inputs, 1), node.attrs.get("axis", 0)
    if isinstance(x, Known):
        table = x.values[0]
        is_table = x.fixed and table.ndim == 2 and dim == 0
        if not is_table or (table.dtype.kind != "f" and table.dtype not in (np.int8, np.uint8)):
            return None
        rows = walk.rules.lookup(x, index)
        if rows is None and not index.fixed:
            raise NotAnEncoder("looks up rows by what is neither token ids, positions nor token types")
        return rows
    index_at = [index.at(p) for p in PROBES]
    if index_at[0].ndim > 1:
        raise NotAnEncoder(f"gathers with indices of shape {index_at[0].shape}")
    return walk.rules.take(x, dim, index_at)


@for_constants("GatherElements")
def _gather_elements(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Computed here: ONNX's reference takes only data of the shape of the indices."""
    x, index, dim = known(inputs, 0), known(inputs, 1), node.attrs.get("axis", 0)
    found = []
    for p in PROBES:
        data, places = x.at(p), index.at(p)
        part = tuple(slice(None if d == dim % data.ndim else n) for d, n in enumerate(places.shape))
        found.append(np.take_along_axis(data[part], places, dim))
    return Known.of(found)


@for_constants("Slice")
def _slice(walk: Walk, node: Node, inputs: Inputs) -> Fact | None:
    x = given(inputs, 0)
    if isinstance(x, Known):
        return _slice_of_positions(walk, x, [optional(inputs, i) for i in range(1, len(inputs))])
    names = ("starts", "ends", "axes", "steps")
    parts: list[list[Any]]
    if "starts" in node.attrs:
        parts = [[node.attrs.get(name)] * 2 for name in names]
    else:
        options = [optional(inputs, i + 1) for i in range(4)]
        parts = [[None if o is None else o.at(p).reshape(-1) for p in PROBES] for o in options]
    starts, ends, axes, steps = parts
    for i, start in enumerate(zip(*starts, strict=True)):
        dim = i if axes[0] is None else int(axes[0][i])
        index = []
        for p in PROBES:
            step = 1 if steps[p] is None else int(steps[p][i])
            index.append(np.arange(laid([x]).shape(p)[dim])[int(start[p]) : _end(ends[p][i], step) : step])
        x = walk.rules.take(x, dim, index)
    return x


def _end(end: Any, step: int) -> int | None:
    """The end of a slice; the lowest integers mean 'past the start' when stepping back."""
    return None if step < 0 and int(end) < -(2**31) else int(end)


def _slice_of_positions(walk: Walk, x: Known, options: list[Known | None]) -> Fact | None:
    """The first rows of a float table ``(rows, channels)`` or ``(1, rows, channels)``, as many as there are tokens."""
    table = x.values[0]
    starts = options[0] if options else None
    if not x.fixed or table.dtype.kind != "f" or table.ndim not in (2, 3) or all(o is None or o.fixed for o in options):
        return None
    dims = [
        0 if len(options) < 3 or options[2] is None else int(options[2].constant("axes").reshape(-1)[0]) % table.ndim
    ]
    if starts is None or dims != [table.ndim - 2] or math.prod(table.shape[:-2]) != 1 or starts.values[0].size != 1:
        return None
    ends = options[1]
    index = []
    for p in PROBES:
        first, last = int(starts.at(p).reshape(())), 0 if ends is None else int(ends.at(p).reshape(()))
        index.append(np.arange(table.shape[-2])[first:last])
    rows = walk.rules.lookup(Known((table.reshape(table.shape[-2:]),), name=x.name), Known((index[0], index[1])))
    return raise_facts.unsqueeze(rows, [0]) if rows is not None and table.ndim == 3 else rows


@rule("Split")
def _split(walk: Walk, node: Node, inputs: Inputs) -> tuple[Fact, ...]:
    x, dim = laid(inputs), node.attrs.get("axis", 0)
    length = x.shape(0)[dim]
    lengths = dims_of(node, inputs, "split")
    if lengths is None:
        part = -(-length // len(node.outputs))
        lengths = [min(part, length - start) for start in range(0, length, part)]
    ends = np.cumsum(lengths)
    return tuple(walk.rules.take(x, dim, [np.arange(e - n, e)] * 2) for n, e in zip(lengths, ends, strict=True))


@rule("Concat")
def _concat(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return walk.rules.concat([given(inputs, i) for i in range(len(inputs))], node.attrs["axis"])


# --------------------------------------------------------------------------------------------------------- element-wise


@rule("Add", "Sub", "Mul", "Div", "Pow", "Sum")
def _binary(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, y = given(inputs, 0), given(inputs, 1)
    match node.op:
        case "Sub":
            return walk.rules.sub(x, y)
        case "Mul":
            return walk.rules.mul(x, y)
        case "Div":
            return walk.rules.div(x, y)
        case "Pow":
            return walk.rules.power(x, known(inputs, 1))
        case _:
            for i in range(1, len(inputs)):
                x = walk.rules.add(x, given(inputs, i))
            return x


UNARY: dict[str, Callable[[Array], Array]] = {
    "Abs": np.abs,
    "Erf": raise_facts.erf,
    "Exp": np.exp,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Relu": lambda v: np.maximum(v, 0),
    "Sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}


@rule(*UNARY)
def _unary(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return walk.rules.unary(given(inputs, 0), UNARY[node.op], node.op)


@rule("Gelu")
def _gelu(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return gelu(walk, given(inputs, 0), "gelu_tanh" if node.attrs.get("approximate") == "tanh" else "gelu")


def gelu(walk: Walk, x: Fact, kind: str) -> Fact:
    """GELU as one operation."""
    x = walk.rules.settle(x)
    return walk.rules.unary(x, lambda v: CURVES[kind], kind) if x.curve is None else x


@rule("Clip")
def _clip(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    ends = [optional(inputs, 1), optional(inputs, 2)]
    for i, name in enumerate(("min", "max")):
        if name in node.attrs:
            ends[i] = Known((np.asarray(node.attrs[name], np.float32),))
    return walk.rules.clip(given(inputs, 0), *ends)


@rule("Max", "Min")
def _limit(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, y = given(inputs, 0), given(inputs, 1)
    if isinstance(x, Known):
        x, y = y, x
    if len(inputs) != 2 or not isinstance(y, Known):
        raise NotAnEncoder("compares two hidden states")
    return walk.rules.clip(x, y, None) if node.op == "Max" else walk.rules.clip(x, None, y)


@rule("Where")
def _where(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return walk.rules.where(given(inputs, 0), given(inputs, 1), given(inputs, 2))


@rule("IsNaN")
def _is_nan(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x = given(inputs, 0)
    if not isinstance(x, Probabilities):
        raise NotAnEncoder("tests hidden states for NaN")
    return raise_facts.IsNaN(x.axes)


# ---------------------------------------------------------------------------------------------- reductions and products

REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceL2": "l2", "ReduceSumSquare": "sum"}


@rule(*REDUCTIONS)
def _reduce(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, dims = given(inputs, 0), dims_of(node, inputs) or []
    if not dims and node.attrs.get("noop_with_empty_axes", 0):
        return x
    if node.op == "ReduceSumSquare":
        x = walk.rules.mul(x, x)
    return walk.rules.reduce(x, REDUCTIONS[node.op], dims, keep=bool(node.attrs.get("keepdims", 1)))  # type: ignore[arg-type]


@rule("LpNormalization")
def _lp_normalization(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    if node.attrs.get("p", 2) != 2:
        raise NotAnEncoder("normalises by another norm than the Euclidean one")
    x = given(inputs, 0)
    return walk.rules.div(x, walk.rules.reduce(x, "l2", [node.attrs.get("axis", -1)], keep=True))


@rule("Softmax")
def _softmax(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    before_13 = walk.opsets.get("", 13) < 13
    return walk.rules.softmax(given(inputs, 0), node.attrs.get("axis", 1 if before_13 else -1))


@rule("LayerNormalization")
def _layer_norm(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x = laid(inputs)
    if node.attrs.get("axis", -1) % len(x.axes) != len(x.axes) - 1:
        raise NotAnEncoder("normalises over more than the last dimension")
    return walk.rules.layer_norm(x, known(inputs, 1), optional(inputs, 2), node.attrs.get("epsilon", 1e-5))


@rule("MatMul")
def _matmul(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return walk.rules.matmul(given(inputs, 0), given(inputs, 1))


@rule("Gemm", MS + "FusedGemm")
def _gemm(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    if node.attrs.get("transA", 0):
        raise NotAnEncoder("transposes its input")
    y: Fact = walk.rules.linear(given(inputs, 0), known(inputs, 1), transposed=bool(node.attrs.get("transB", 0)))
    y = with_bias(walk, scaled(walk, y, node.attrs.get("alpha", 1.0)), inputs, 2, node.attrs.get("beta", 1.0))
    activation = node.attrs.get("activation", "")
    return walk.rules.unary(y, UNARY[activation], activation) if activation else y


def scaled(walk: Walk, x: Fact, factor: float) -> Fact:
    """``factor · x``."""
    return x if factor == 1 else walk.rules.mul(x, Known((np.asarray(factor, np.float32),)))


def with_bias(walk: Walk, x: Fact, inputs: Inputs, place: int, factor: float = 1.0) -> Fact:
    """``x`` plus a bias that may be left out."""
    bias = optional(inputs, place)
    if bias is None:
        return x
    return walk.rules.add(x, Known(tuple(v * factor for v in bias.values), name=bias.name) if factor != 1 else bias)


@rule("Attention")
def _attention(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Opset 23: ``(batch, heads, token, head)`` or ``(batch, token, channel)``."""
    if node.attrs.get("is_causal", 0) or any(x is not None for x in inputs[4:6]) or node.attrs.get("softcap", 0):
        raise NotAnEncoder("attends causally, with a cache, or with capped scores")
    q, k, v, mask, scale = laid(inputs), laid(inputs, 1), laid(inputs, 2), optional(inputs, 3), node.attrs.get("scale")
    if len(q.axes) == 3:
        heads = node.attrs["q_num_heads"]
        if node.attrs["kv_num_heads"] != heads:
            raise NotAnEncoder("shares keys between heads")
        return walk.rules.attention(q, k, v, heads, scale, [mask] if mask else [])
    scores = walk.rules.matmul(q, raise_facts.transpose(k, [0, 1, 3, 2]))
    scores = scaled(walk, scores, 1 / math.sqrt(q.shape(0)[-1]) if scale is None else scale)
    if mask is not None and isinstance(scores, Scores):
        scores = walk.rules.mask_scores(scores, mask)
    return walk.rules.matmul(walk.rules.softmax(scores, -1), v)
