"""Plain Relax for ONNX operators; see onnx_plain.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op as R

from .onnx_graph import MS, Node
from .onnx_plain import RULES, SIZES, Plain, Rule, Value

Inputs = list[Value | None]
F = TypeVar("F", bound=Rule)


def rule(*ops: str) -> Callable[[F], F]:
    """Register a rule for operators."""

    def register(function: F) -> F:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def at(inputs: Inputs, place: int) -> Value | None:
    """An input that may be left out."""
    return inputs[place] if place < len(inputs) else None


def axes_of(plain: Plain, node: Node, inputs: Inputs, name: str = "axes", place: int = 1) -> list[int] | None:
    """Numbers given as an attribute (older opsets) or as an input."""
    if name in node.attrs:
        return list(node.attrs[name])
    array = plain.constant(at(inputs, place))
    return None if array is None else [int(n) for n in array.reshape(-1)]


# --------------------------------------------------------------------------------------------------------- element-wise

UNARY: dict[str, Callable[[relax.Expr], relax.Expr]] = {
    "Identity": lambda x: x,
    "Dropout": lambda x: x,
    "Abs": R.abs,
    "Ceil": R.ceil,
    "Cos": R.cos,
    "Erf": R.erf,
    "Exp": R.exp,
    "Floor": R.floor,
    "Gelu": R.nn.gelu,
    MS + "Gelu": R.nn.gelu,
    "IsNaN": R.isnan,
    "Log": R.log,
    "Neg": R.negative,
    "Not": R.logical_not,
    "Relu": R.nn.relu,
    "Round": R.round,
    "Sigmoid": R.sigmoid,
    "Sign": R.sign,
    "Sin": R.sin,
    "Sqrt": R.sqrt,
    "Tanh": R.tanh,
}


@rule(*UNARY)
def _unary(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    operator = UNARY[node.op]
    return (R.nn.gelu_tanh if node.attrs.get("approximate") == "tanh" else operator)(plain.tensor(inputs[0]))


BINARY: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "Add": R.add,
    "And": R.logical_and,
    "Div": R.divide,
    "Equal": R.equal,
    "Greater": R.greater,
    "GreaterOrEqual": R.greater_equal,
    "Less": R.less,
    "LessOrEqual": R.less_equal,
    "Max": R.maximum,
    "Min": R.minimum,
    "Mod": R.floor_mod,
    "Mul": R.multiply,
    "Or": R.logical_or,
    "Pow": R.power,
    "Sub": R.subtract,
    "Sum": R.add,
    "Xor": R.logical_xor,
}


@rule(*BINARY)
def _binary(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    first, *rest = (plain.tensor(x) for x in inputs)
    for other in rest:
        if other.ty.dtype != first.ty.dtype:  # of Pow, or where quantised arithmetic became real
            if node.op == "Pow" or "float" in str(first.ty.dtype):
                other = plain.emit(R.astype(other, first.ty.dtype))
            else:
                first = plain.emit(R.astype(first, other.ty.dtype))
        integer = node.op == "Div" and "int" in str(first.ty.dtype)
        first = plain.emit((R.floor_divide if integer else BINARY[node.op])(first, other))
    return first


@rule("Reciprocal")
def _reciprocal(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x = plain.tensor(inputs[0])
    return R.divide(relax.const(1, x.ty.dtype), x)


@rule("Where")
def _where(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.where(*(plain.tensor(x) for x in inputs))


@rule("Cast")
def _cast(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    return R.astype(plain.tensor(inputs[0]), "float32" if dtype in ("float16", "bfloat16") else dtype)


@rule("Clip")
def _clip(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x = plain.tensor(inputs[0])
    for place, name, limit in ((1, "min", R.maximum), (2, "max", R.minimum)):
        bound = plain.constant(at(inputs, place)) if name not in node.attrs else node.attrs[name]
        if bound is not None:
            x = plain.emit(limit(x, relax.const(float(bound), x.ty.dtype)))
    return x


@rule(MS + "BiasGelu", MS + "FastGelu")
def _bias_gelu(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x = plain.tensor(inputs[0])
    if (bias := at(inputs, 1)) is not None:
        x = plain.emit(R.add(x, plain.tensor(bias)))
    return (R.nn.gelu_tanh if node.op.endswith("FastGelu") else R.nn.gelu)(x)


# ------------------------------------------------------------------------------------------------------------ structure


def fitted(plain: Plain, shapes: list[tuple[int, ...]]) -> list[Any]:
    """Dimensions given at SIZES as expressions."""
    if len({len(shape) for shape in shapes}) != 1:
        raise ValueError(f"the rank depends on the input: {shapes}")
    return [plain.fit(dims) for dims in zip(*shapes, strict=True)]


@rule("Shape", "Size")
def _shape(plain: Plain, node: Node, inputs: Inputs) -> Value:
    shapes = plain.shape(inputs[0])
    if node.op == "Size":
        return Value(known=tuple(np.array(math.prod(s), np.int64) for s in shapes))
    part = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    return Value(known=tuple(np.array(s[part], np.int64) for s in shapes))


@rule("Reshape", "Flatten")
def _reshape(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    old = plain.shape(inputs[0])
    if node.op == "Flatten":
        dim = node.attrs.get("axis", 1)
        new = [[math.prod(shape[:dim]), math.prod(shape[dim:])] for shape in old]
    else:
        new = plain.ints(inputs[1]) or [[] for _ in old]
        for shape, target in zip(old, new, strict=True):
            if not node.attrs.get("allowzero", 0):
                target[:] = [shape[i] if d == 0 else d for i, d in enumerate(target)]
            if -1 in target:
                rest = math.prod(d for d in target if d != -1)
                target[target.index(-1)] = math.prod(shape) // max(1, rest)
    return R.reshape(plain.tensor(inputs[0]), fitted(plain, [tuple(shape) for shape in new]))


@rule("Transpose")
def _transpose(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.permute_dims(plain.tensor(inputs[0]), node.attrs.get("perm"))


@rule("Squeeze")
def _squeeze(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.squeeze(plain.tensor(inputs[0]), axes_of(plain, node, inputs))


@rule("Unsqueeze")
def _unsqueeze(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.expand_dims(plain.tensor(inputs[0]), axes_of(plain, node, inputs) or [])


@rule("Expand")
def _expand(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    shapes = zip(plain.shape(inputs[0]), plain.ints(inputs[1]) or (), strict=True)
    target = fitted(plain, [np.broadcast_shapes(old, tuple(new)) for old, new in shapes])
    return R.broadcast_to(plain.tensor(inputs[0]), target)


@rule("Concat")
def _concat(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.concat([plain.tensor(x) for x in inputs], node.attrs["axis"])


@rule("Split")
def _split(plain: Plain, node: Node, inputs: Inputs) -> tuple[relax.Expr, ...]:
    x, shape = plain.tensor(inputs[0]), plain.shape(inputs[0])[0]
    dim = node.attrs.get("axis", 0) % len(shape)
    lengths = axes_of(plain, node, inputs, "split")
    if lengths is None:
        total = shape[dim]
        part = -(-total // len(node.outputs))
        lengths = [min(part, total - start) for start in range(0, total, part)]
    ends = np.cumsum(lengths).tolist()
    return tuple(plain.slice(x, dim, [(e - n, e)] * len(SIZES)) for n, e in zip(lengths, ends, strict=True))


@rule("Slice")
def _slice(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, shapes = plain.tensor(inputs[0]), plain.shape(inputs[0])
    names = ("starts", "ends", "axes", "steps")
    if "starts" in node.attrs:
        options: list[Any] = [[node.attrs[n]] * len(SIZES) if n in node.attrs else None for n in names]
    else:
        options = [plain.ints(at(inputs, i + 1)) for i in range(4)]
    starts, ends, axes, steps = options
    for i in range(len(starts[0])):
        dim = (i if axes is None else axes[0][i]) % len(shapes[0])
        step = 1 if steps is None else steps[0][i]
        if step < 0:
            raise ValueError("it slices backwards")
        bounds = [slice(s[i], e[i]).indices(shape[dim]) for s, e, shape in zip(starts, ends, shapes, strict=True)]
        if step == 1 and all((b[0], b[1]) == (0, shape[dim]) for b, shape in zip(bounds, shapes, strict=True)):
            continue
        x = plain.slice(x, dim, [(b, max(b, e)) for b, e, _ in bounds], step)
    return x


@rule("Gather")
def _gather(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, index, dim = plain.tensor(inputs[0]), plain.tensor(inputs[1]), node.attrs.get("axis", 0)
    numbers = inputs[1].fixed if inputs[1] else None
    if numbers is not None and (numbers < 0).any():
        lengths = {shape[dim] for shape in plain.shape(inputs[0])}
        if len(lengths) > 1:
            raise ValueError("it takes elements from the end of a dynamic dimension")
        index = relax.const(np.where(numbers < 0, numbers + lengths.pop(), numbers), "int64")
    return R.take(x, index, dim, "wrap")


@rule("GatherElements")
def _gather_elements(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.gather_elements(plain.tensor(inputs[0]), plain.tensor(inputs[1]), node.attrs.get("axis", 0))


@rule("GatherND")
def _gather_nd(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.gather_nd(plain.tensor(inputs[0]), plain.tensor(inputs[1]), node.attrs.get("batch_dims", 0))


@rule("Range")
def _range(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    numbers = [plain.ints(x) or [[0]] * len(SIZES) for x in inputs]
    ends = [plain.fit([int(v[0]) for v in values]) for values in numbers]
    return R.arange(*ends, dtype="int64")


@rule("ConstantOfShape")
def _constant_of_shape(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    fill = np.asarray(node.attrs.get("value", np.zeros(1, np.float32))).reshape(())
    shape = fitted(plain, [tuple(s) for s in plain.ints(inputs[0]) or ()])
    return R.full(shape, relax.const(fill, str(fill.dtype)), str(fill.dtype))


@rule("Trilu")
def _trilu(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    k = plain.constant(at(inputs, 1))
    return (R.triu if node.attrs.get("upper", 1) else R.tril)(plain.tensor(inputs[0]), 0 if k is None else int(k))


@rule("Pad")
def _pad(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    """By constants, written as concatenation: Relax pads symbolic shapes only in part."""
    if node.attrs.get("mode", "constant") != "constant":
        raise ValueError(f"it pads by {node.attrs['mode']}")
    x, shapes = plain.tensor(inputs[0]), [list(s) for s in plain.shape(inputs[0])]
    pads, rank, dtype = axes_of(plain, node, inputs, "pads") or [], len(shapes[0]), x.ty.dtype
    fill = plain.constant(at(inputs, 2)) if len(inputs) > 2 else node.attrs.get("value", 0.0)
    value = relax.const(float(0 if fill is None else fill), dtype)
    for place, length in enumerate(pads):
        dim = place % rank
        if length < 0:
            raise ValueError("it pads by a negative length")
        if length:
            block = R.full(fitted(plain, [(*s[:dim], length, *s[dim + 1 :]) for s in shapes]), value, dtype)
            x = plain.emit(R.concat([block, x] if place < rank else [x, block], dim))
            for shape in shapes:
                shape[dim] += length
    return x


# ---------------------------------------------------------------------------------------------- reductions and products

REDUCTIONS = {
    "ReduceMax": R.max,
    "ReduceMean": R.mean,
    "ReduceMin": R.min,
    "ReduceProd": R.prod,
    "ReduceSum": R.sum,
    "ReduceSumSquare": R.sum,
    "ReduceL2": R.sum,
}


@rule(*REDUCTIONS)
def _reduce(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, axes = plain.tensor(inputs[0]), axes_of(plain, node, inputs)
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return x
    if node.op in ("ReduceSumSquare", "ReduceL2"):
        x = plain.emit(R.multiply(x, x))
    reduced = REDUCTIONS[node.op](x, axes or None, bool(node.attrs.get("keepdims", 1)))
    return R.sqrt(plain.emit(reduced)) if node.op == "ReduceL2" else reduced


@rule("ArgMax", "ArgMin")
def _arg(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    operator = R.argmax if node.op == "ArgMax" else R.argmin
    return operator(plain.tensor(inputs[0]), node.attrs.get("axis", 0), bool(node.attrs.get("keepdims", 1)))


@rule("CumSum")
def _cumsum(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    if node.attrs.get("reverse", 0):
        raise ValueError("it sums backwards")
    axis = plain.constant(inputs[1])
    return R.cumsum(
        plain.tensor(inputs[0]), int(axis) if axis is not None else 0, exclusive=bool(node.attrs.get("exclusive", 0))
    )


@rule("Softmax", "LogSoftmax")
def _softmax(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    operator = R.nn.softmax if node.op == "Softmax" else R.nn.log_softmax
    return operator(plain.tensor(inputs[0]), node.attrs.get("axis", 1 if plain.opsets.get("", 13) < 13 else -1))


@rule("LayerNormalization")
def _layer_norm(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, gamma = plain.tensor(inputs[0]), plain.tensor(inputs[1])
    beta = plain.emit(R.zeros_like(gamma)) if at(inputs, 2) is None else plain.tensor(inputs[2])
    axis = node.attrs.get("axis", -1)
    if axis not in (-1, len(x.ty.shape) - 1):
        raise ValueError("it normalises over more than the last dimension")
    return R.nn.layer_norm(x, gamma, beta, [-1], node.attrs.get("epsilon", 1e-5))


@rule("SkipLayerNormalization", MS + "SkipLayerNormalization")
def _skip_layer_norm(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x = plain.emit(R.add(plain.tensor(inputs[0]), plain.tensor(inputs[1])))
    if (bias := at(inputs, 4)) is not None:
        x = plain.emit(R.add(x, plain.tensor(bias)))
    beta = plain.tensor(inputs[3]) if at(inputs, 3) else plain.emit(R.zeros_like(plain.tensor(inputs[2])))
    return R.nn.layer_norm(x, plain.tensor(inputs[2]), beta, [-1], node.attrs.get("epsilon", 1e-12))


@rule("MatMul")
def _matmul(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.matmul(plain.tensor(inputs[0]), plain.tensor(inputs[1]))


@rule("Gemm", MS + "FusedGemm")
def _gemm(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, y = (
        plain.emit(R.permute_dims(plain.tensor(inputs[i]))) if node.attrs.get(name, 0) else plain.tensor(inputs[i])
        for i, name in enumerate(("transA", "transB"))
    )
    product = plain.emit(R.matmul(x, y))
    if (alpha := node.attrs.get("alpha", 1.0)) != 1:
        product = plain.emit(R.multiply(product, relax.const(alpha, "float32")))
    if (bias := at(inputs, 2)) is not None:
        scaled = R.multiply(plain.tensor(bias), relax.const(node.attrs.get("beta", 1.0), "float32"))
        product = plain.emit(R.add(product, plain.emit(scaled)))
    return UNARY[node.attrs["activation"]](product) if node.attrs.get("activation") else product


@rule("Einsum")
def _einsum(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return R.einsum([plain.tensor(x) for x in inputs], node.attrs["equation"].replace(" ", ""))


# --------------------------------------------------------------------------------------------------------- quantisation


def real(plain: Plain, value: Value | None, scale: Value | None, zero: Value | None, dim: int = 1) -> relax.Expr:
    """``(value − zero) · scale`` in float32; ``dim`` is what a scale per channel varies over."""
    x = plain.emit(R.astype(plain.tensor(value), "float32"))
    rank = len(x.ty.shape)

    def spread(v: Value) -> relax.Expr:
        array = plain.constant(v) if v.known is not None else None
        if array is None:
            return plain.tensor(v)
        shape = [-1 if d == dim % rank else 1 for d in range(rank)] if array.size > 1 else []
        return relax.const(array.astype(np.float32).reshape(shape), "float32")

    if zero is not None:
        x = plain.emit(R.subtract(x, spread(zero)))
    return x if scale is None else plain.emit(R.multiply(x, spread(scale)))


@rule("QuantizeLinear", MS + "QuantizeLinear")
def _quantise(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x = plain.emit(R.divide(plain.tensor(inputs[0]), plain.tensor(inputs[1])))
    if (zero := plain.constant(at(inputs, 2))) is None:
        return x
    return R.add(x, relax.const(zero.astype(np.float32), "float32"))


@rule("DequantizeLinear", MS + "DequantizeLinear")
def _dequantise(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    return real(plain, inputs[0], inputs[1], at(inputs, 2), node.attrs.get("axis", 1))


@rule("DynamicQuantizeLinear")
def _dynamic_quantise(plain: Plain, node: Node, inputs: Inputs) -> tuple[relax.Expr | Value, ...]:
    one, zero = (Value(known=(np.asarray(v, np.float32),) * len(SIZES)) for v in (1, 0))
    return plain.tensor(inputs[0]), one, zero


@rule("MatMulInteger")
def _matmul_integer(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, y = real(plain, inputs[0], None, at(inputs, 2)), real(plain, inputs[1], None, at(inputs, 3), -1)
    return R.matmul(x, y)


@rule(MS + "DynamicQuantizeMatMul")
def _dynamic_quantise_matmul(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    product = R.matmul(plain.tensor(inputs[0]), real(plain, inputs[1], inputs[2], at(inputs, 3), -1))
    return product if at(inputs, 4) is None else R.add(plain.emit(product), plain.tensor(inputs[4]))


@rule(MS + "MatMulIntegerToFloat")
def _matmul_integer_to_float(plain: Plain, node: Node, inputs: Inputs) -> relax.Expr:
    x, y = real(plain, inputs[0], inputs[2], at(inputs, 4)), real(plain, inputs[1], inputs[3], at(inputs, 5), -1)
    product = R.matmul(x, y)
    return product if at(inputs, 6) is None else R.add(plain.emit(product), plain.tensor(inputs[6]))
