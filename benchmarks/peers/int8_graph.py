"""A float graph as the int8 graph that DeepSparse recognises.

The form is what SparseML's exporter writes: QuantizeLinear of activations (u8), MatMulInteger with weights stored as u8
around 128, bias added in int32, Cast, Mul by the product of the scales. Q·Kᵀ and P·V are integer too, tables are int8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .calibration import batches
from .protocol import Array

OPSET = 14
"""The last that the engine knows all ops of."""
HEAD = "logits"
"""Stays fp32, as in every other engine."""
MIDDLE = 128
"""Zero point of weights stored as u8."""


def quantised(source: Path) -> onnx.ModelProto:
    """Quantise statically, with the range of each activation over the calibration requests."""
    model = onnx.load(source)
    decompose_layer_norms(model)
    return _Quantiser(model, ranges(model)).run()


def decompose_layer_norms(model: onnx.ModelProto) -> None:
    """Write LayerNormalization as the nine ops that exporters wrote before opset 17 had it."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        x, gamma, beta = node.input
        name = node.output[0]
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        for suffix, value in (("two", 2.0), ("eps", epsilon)):
            model.graph.initializer.append(numpy_helper.from_array(np.float32(value), f"{name}.{suffix}"))
        steps = (
            ("ReduceMean", [x], "mean"),
            ("Sub", [x, "mean"], "centred"),
            ("Pow", ["centred", "two"], "squared"),
            ("ReduceMean", ["squared"], "variance"),
            ("Add", ["variance", "eps"], "shifted"),
            ("Sqrt", ["shifted"], "deviation"),
            ("Div", ["centred", "deviation"], "normed"),
            ("Mul", ["normed", gamma], "scaled"),
            ("Add", ["scaled", beta], ""),
        )
        outer = {x, gamma, beta}
        for op, inputs, output in steps:
            attributes = {"axes": [-1]} if op == "ReduceMean" else {}
            wired = [i if i in outer else f"{name}.{i}" for i in inputs]
            target = f"{name}.{output}" if output else name
            nodes.append(helper.make_node(op, wired, [target], name=f"{target}.{op}", **attributes))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import[0].version = OPSET


def ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Least and greatest value of everything that is multiplied as a matrix, 0 included."""
    constants = {i.name for i in model.graph.initializer}
    matmuls = [n for n in model.graph.node if n.op_type == "MatMul"]
    names = list(dict.fromkeys(i for n in matmuls for i in n.input if i not in constants))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, (0.0, 0.0))
    for inputs in batches():
        for name, value in zip(names, session.run(names, inputs), strict=True):
            low, high = found[name]
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


class _Quantiser:
    def __init__(self, model: onnx.ModelProto, found: dict[str, tuple[float, float]]) -> None:
        self.model = model
        self.ranges = found
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.integers: dict[str, tuple[str, str, float]] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def run(self) -> onnx.ModelProto:
        merged: set[str] = set()  # bias additions that became integer
        for node in self.model.graph.node:
            if node.output[0] in merged:
                continue
            if node.op_type == "MatMul" and node.input[1] not in self.initializers:
                self.product(node)
            elif node.op_type == "MatMul" and HEAD not in node.name:
                merged.add(self.dense(node))
            elif node.op_type == "Gather" and self.is_table(node.input[0]):
                self.table(node)
            else:
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(i for name, i in self.initializers.items() if name in used)
        onnx.checker.check_model(self.model)
        return self.model

    def constant(self, name: str, value: Array) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def node(self, op: str, inputs: list[str], output: str, name: str, **attributes: int) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def activation(self, name: str) -> tuple[str, str, float]:
        """The integer form of a value, its zero point and its scale."""
        if name not in self.integers:
            low, high = self.ranges[name]
            scale = max((high - low) / 255, 1e-8)
            zero = self.constant(name + "_zero", np.uint8(np.clip(round(-low / scale), 0, 255)))
            inputs = [name, self.constant(name + "_scale", np.float32(scale)), zero]
            self.integers[name] = (
                self.node("QuantizeLinear", inputs, name + "_q", name + "_QuantizeLinear"),
                zero,
                scale,
            )
        return self.integers[name]

    def product(self, node: onnx.NodeProto) -> None:
        """Two activations."""
        (a, a_zero, a_scale), (b, b_zero, b_scale) = (self.activation(i) for i in node.input)
        name = node.name
        total = self.node("MatMulInteger", [a, b, a_zero, b_zero], name + "_i32", name + "_quant")
        self.rescale(total, np.float32(a_scale * b_scale), node.output[0], name)

    def dense(self, node: onnx.NodeProto) -> str:
        """An activation and a weight (in, out), and the bias; returns the value that now holds the result."""
        name = node.name
        (add,) = self.readers[node.output[0]]
        bias = next(numpy_helper.to_array(self.initializers[i]) for i in add.input if i in self.initializers)
        x, zero, scale = self.activation(node.input[0])
        weight, weight_scale = stored(numpy_helper.to_array(self.initializers[node.input[1]]))
        inputs = [x, self.constant(name + ".w", weight), zero, self.constant(name + ".wz", np.uint8(MIDDLE))]
        total = self.node("MatMulInteger", inputs, name + "_i32", name + "_quant")
        out_scale = np.float32(scale * weight_scale)
        integer_bias = self.constant(name + ".b", np.rint(bias / out_scale).astype(np.int32))
        total = self.node("Add", [total, integer_bias], name + "_i32b", name + "_bias_add_quant")
        self.rescale(total, out_scale, add.output[0], name)
        return str(add.output[0])

    def rescale(self, total: str, scale: Array, output: str, name: str) -> None:
        floats = self.node("Cast", [total], name + "_f", name + "_cast", to=TensorProto.FLOAT)
        self.node("Mul", [floats, self.constant(name + ".s", scale)], output, name + "_rescale_mul")

    def is_table(self, name: str) -> bool:
        table = self.initializers.get(name)
        return table is not None and table.data_type == TensorProto.FLOAT and len(table.dims) == 2

    def table(self, node: onnx.NodeProto) -> None:
        """Rows of a table, dequantised after they were looked up."""
        name = node.name
        values, scale = stored(numpy_helper.to_array(self.initializers[node.input[0]]))
        rows = self.node("Gather", [self.constant(name + ".t", values), node.input[1]], name + "_q", name, axis=0)
        numbers = [self.constant(name + ".s", np.float32(scale)), self.constant(name + ".z", np.uint8(MIDDLE))]
        self.node("DequantizeLinear", [rows, *numbers], node.output[0], name + "_dq")


def stored(weight: Array) -> tuple[Array, float]:
    """A weight as u8 around 128, which keeps zeros, and its scale."""
    scale = max(float(np.abs(weight).max()) / 127, 1e-8)
    return (np.clip(np.rint(weight / scale), -127, 127) + MIDDLE).astype(np.uint8), scale
