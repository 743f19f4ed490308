"""What ONNX's quantised operators mean, the standard ones and those of ONNX Runtime (domain ``com.microsoft``).

Integer weights stay what they are: a constant keeps its integers and scales (raise_facts.Integers). Activations are
only renamed: a quantised activation is the same value in another unit.
"""

from __future__ import annotations

import numpy as np

from whet.passes.raise_facts import Array, DontCare, Fact, Integers, Known, NotAnEncoder, Scale, Scales

from .onnx_graph import MS, Node
from .onnx_ops import Inputs, for_constants, given, known, optional, rule, scalar, scaled, with_bias
from .onnx_walk import Walk


def integers(values: Known, scale: Array, zero_point: Known | None, dim: int | None = None) -> Known:
    """The constant ``(values − zero_point) · scale`` with its integers; ``dim`` is what the scale varies over."""
    array = values.constant(values.name or "a quantised weight").astype(np.int32)

    def spread(v: Array) -> Array:
        if v.size == 1 or dim is None:
            return v.reshape(()) if v.size == 1 else v
        return v.reshape([-1 if d == dim % array.ndim else 1 for d in range(array.ndim)])

    if zero_point is not None:
        array = array - spread(zero_point.constant("a zero point").astype(np.int32))
    factor = spread(np.asarray(scale, np.float32))
    return Known((array.astype(np.float32) * factor,), Integers(array, factor), values.name)


@for_constants("DequantizeLinear", MS + "DequantizeLinear")
def _dequantise(walk: Walk, node: Node, inputs: Inputs) -> Fact | None:
    x, scale = given(inputs, 0), known(inputs, 1)
    if isinstance(x, Known) and (node.attrs.get("block_size", 0) or scale.values[0].ndim > 1):
        return None
    return plain(walk, inputs, 0, node.attrs.get("axis", 1))


def plain(walk: Walk, inputs: Inputs, place: int, dim: int | None = None) -> Fact:
    """What a quantised operand, followed by its scale and zero point, means."""
    x, scale, zero = given(inputs, place), known(inputs, place + 1), optional(inputs, place + 2)
    if not isinstance(x, Known):
        return walk.rules.dequantise(x, scale, zero)
    if not x.fixed and x.values[0].dtype.kind == "f":
        return x  # see _quantise
    return integers(x, scale.constant("a scale"), zero, dim)


@for_constants("QuantizeLinear", MS + "QuantizeLinear")
def _quantise(walk: Walk, node: Node, inputs: Inputs) -> Fact | None:
    x = given(inputs, 0)
    if isinstance(x, Known):
        # Masks are not rounded: like activations they are only renamed. Weights are.
        return None if x.fixed else x
    return walk.rules.quantise(given(inputs, 0), Scale(scalar(inputs, 1)))


@rule("DynamicQuantizeLinear")
def _dynamic_quantise(walk: Walk, node: Node, inputs: Inputs) -> tuple[Fact, ...]:
    scale = Scale()
    return walk.rules.quantise(given(inputs, 0), scale), Scales((scale,), np.asarray(1.0)), DontCare()


@rule("MatMulInteger")
def _matmul_integer(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    return product_of_integers(walk, inputs)


def product_of_integers(walk: Walk, inputs: Inputs, places: tuple[int, int, int] = (0, 1, 3)) -> Fact:
    """``x · (weight − zero point)`` in the unit of ``x``, or the product of two activations."""
    x, y = given(inputs, places[0]), given(inputs, places[1])
    if isinstance(y, Known):
        y = integers(y, np.asarray(1, np.float32), optional(inputs, places[2]), dim=-1)
    return walk.rules.matmul(x, y)


@rule("QLinearMatMul")
def _qlinear_matmul(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Inputs: x, its scale and zero point, the same of y, and of the result."""
    product = walk.rules.matmul(plain(walk, inputs, 0), plain(walk, inputs, 3, dim=-1))
    return walk.rules.quantise(product, Scale(scalar(inputs, 6)))


@rule(MS + "DynamicQuantizeMatMul")
def _dynamic_quantise_matmul(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Inputs: x, weight, its scale, its zero point, bias."""
    weight = integers(known(inputs, 1), known(inputs, 2).constant("a scale"), optional(inputs, 3), dim=-1)
    return with_bias(walk, walk.rules.linear(given(inputs, 0), weight), inputs, 4)


@rule(MS + "MatMulIntegerToFloat")
def _matmul_integer_to_float(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Inputs: x, y, their scales, their zero points, bias."""
    scale, by = given(inputs, 2), known(inputs, 3)
    scale = (
        Known((scale.constant("a scale") * by.constant("a scale"),))
        if isinstance(scale, Known)
        else walk.rules.mul(scale, by)
    )
    return with_bias(walk, walk.rules.mul(product_of_integers(walk, inputs, (0, 1, 5)), scale), inputs, 6)


@rule(MS + "QGemm")
def _qgemm(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Inputs: x, its scale, its zero point, weight, its scale, its zero point, int32 bias, scale of the result."""
    if node.attrs.get("transA", 0):
        raise NotAnEncoder("transposes its input")
    transposed = bool(node.attrs.get("transB", 0))
    weight = plain(walk, inputs, 3, dim=0 if transposed else -1)
    if not isinstance(weight, Known):
        raise NotAnEncoder("multiplies two hidden states")
    y: Fact = walk.rules.linear(plain(walk, inputs, 0), weight, transposed=transposed)
    y = scaled(walk, y, node.attrs.get("alpha", 1.0))
    if (bias := optional(inputs, 6)) is not None:
        unit = known(inputs, 4).constant("a scale").astype(np.float64) * scalar(inputs, 1)
        y = walk.rules.add(y, Known((bias.constant("a bias") * unit,), name=bias.name))
    return y if len(inputs) < 8 or inputs[7] is None else walk.rules.quantise(y, Scale(scalar(inputs, 7)))


@rule(MS + "QLinearAdd", MS + "QLinearMul")
def _qlinear_binary(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x, y = (plain(walk, inputs, place) for place in (0, 3))
    both = walk.rules.add(x, y) if node.op.endswith("Add") else walk.rules.mul(x, y)
    return walk.rules.quantise(both, Scale(scalar(inputs, 6)))


@rule(MS + "QLinearSoftmax")
def _qlinear_softmax(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    x = walk.rules.softmax(plain(walk, inputs, 0), node.attrs.get("axis", -1))
    return walk.rules.quantise(x, Scale(scalar(inputs, 3)))
