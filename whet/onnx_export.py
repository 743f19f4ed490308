"""Writes an encoder-dialect graph as ONNX, so that other engines can run the model that Whet compiles.

The graph takes padded batches as Hugging Face models do and is written the way torch's exporter writes them
(LayerNormalization, erf-GELU in five nodes, additive attention mask): the forms that other engines recognise and fuse.
Weights that were integer in the source are written as the floats they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from whet.frontend.model import Model
from whet.passes import dialect
from whet.passes.graph import Graph, arguments, attributes, is_per_token, weight_of

OPSET = 17
"""The first with LayerNormalization."""

_MASKED = -10000.0
"""Added to the scores of padding: BERT's own number, which fusions look for; its exponential is 0."""

_PROTOBUF_LIMIT = 2**31 - 2**20


def export_onnx(model: Model, path: str | PathLike[str]) -> None:
    """Write ``model`` to ``path``.

    Inputs are int64 ``(batch, sequence)`` named as in ``model.inputs``; the output ``output`` is float32
    ``(batch, sequence, channels)`` or ``(batch, channels)``.

    Raises:
        ValueError: the model is no dialect graph, or is too large for one ONNX file (2 GB).

    """
    if not model.dialect:
        raise ValueError(f"{model.name} was not recognised as an encoder, so it can't be written as ONNX; use its file")
    writer = _Writer(Graph(model.module), model.inputs)
    graph = helper.make_graph(
        writer.nodes,
        model.name,
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in model.inputs],
        [helper.make_tensor_value_info(writer.finish(), TensorProto.FLOAT, writer.output_shape())],
        writer.initializers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="whet", ir_version=8)
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        raise ValueError(f"{model.name} has {proto.ByteSize() / 1e9:.1f} GB of weights; an ONNX file holds less than 2")
    Path(path).write_bytes(proto.SerializeToString())


class _Writer:
    """Turns bindings into nodes; ``names`` maps each Relax variable to the ONNX value that holds it."""

    def __init__(self, graph: Graph, inputs: tuple[str, ...]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.names: dict[relax.Var, str] = {}
        self._mask_values: dict[str, str] = {}
        for binding in graph.bindings:
            self._write(binding.var, binding.value)

    def finish(self) -> str:
        """Name the result ``output``."""
        self.nodes.append(helper.make_node("Identity", [self.names[self.graph.result]], ["output"]))
        return "output"

    def output_shape(self) -> list[Any]:
        channels = dialect.shape_of(self.graph.result)[1]
        return ["batch", "sequence", channels] if is_per_token(self.graph, self.graph.result) else ["batch", channels]

    def node(self, op: str, *inputs: str, name: str = "", **attrs: Any) -> str:
        output = f"{name or op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attrs))
        return output

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "constant") -> str:
        name = f"{name}_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype, order="C"), name))
        return name

    def _write(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Call):
            op = str(value.op.name).removeprefix(dialect.PREFIX)
            if op == "quantized_weight":
                return  # read where it is used
            if op not in _OPS:
                raise ValueError(f"{op} is not an op of the encoder dialect; known: {', '.join(_OPS)}")
            self.names[var] = _OPS[op](self, var, value, **attributes(value))
        elif (read := arguments(value)) and read[0] in self.names:
            self.names[var] = self.names[read[0]]

    def value(self, expression: relax.Expr) -> str:
        return self.names[expression]

    def array(self, expression: relax.Expr) -> np.ndarray[Any, Any]:
        return self.graph.constant(expression)

    def _once(self, key: str, make: Callable[[], str]) -> str:
        """Write what depends on the mask alone, once."""
        if key not in self._mask_values:
            self._mask_values[key] = make()
        return self._mask_values[key]

    def additive_mask(self) -> str:
        """0 where tokens are kept and a large negative number elsewhere, ``(batch, 1, 1, sequence)``."""

        def make() -> str:
            wide = self.node("Unsqueeze", "attention_mask", self.constant([1], np.int64))
            wide = self.node("Unsqueeze", wide, self.constant([2], np.int64))
            kept = self.node("Cast", wide, to=TensorProto.FLOAT)
            return self.node("Mul", self.node("Sub", self.constant(1.0), kept), self.constant(_MASKED))

        return self._once("additive", make)

    def column_mask(self) -> str:
        """1.0 where tokens are kept, 0.0 elsewhere, ``(batch, sequence, 1)``."""

        def make() -> str:
            return self.node(
                "Unsqueeze",
                self.node("Cast", "attention_mask", to=TensorProto.FLOAT),
                self.constant([2], np.int64),
            )

        return self._once("column", make)


def _embed(w: _Writer, var: relax.Var, call: relax.Call, *, eps: float) -> str:
    words, positions, types = (weight_of(w.graph, table) for table in call.args[3:6])
    x = w.node("Gather", w.constant(words, name="words"), "input_ids")
    if "token_type_ids" in w.inputs:
        x = w.node("Add", x, w.node("Gather", w.constant(types, name="token_types"), "token_type_ids"))
    else:
        positions = positions + types[0]
    length = w.node("Slice", w.node("Shape", "input_ids"), *(w.constant([i], np.int64) for i in (1, 2, 0)))
    every = w.constant(np.arange(len(positions))[None], np.int64)
    ids = w.node("Slice", every, w.constant([0], np.int64), length, w.constant([1], np.int64))
    x = w.node("Add", x, w.node("Gather", w.constant(positions, name="positions"), ids))
    return _normed(w, var, x, call.args[6], call.args[7], eps)


def _layer_norm(w: _Writer, var: relax.Var, call: relax.Call, *, eps: float) -> str:
    return _normed(w, var, w.value(call.args[0]), call.args[1], call.args[2], eps)


def _normed(w: _Writer, var: relax.Var, x: str, gamma: relax.Expr, beta: relax.Expr, eps: float) -> str:
    scale, shift = w.constant(w.array(gamma)), w.constant(w.array(beta))
    return w.node("LayerNormalization", x, scale, shift, name=var.name, axis=-1, epsilon=float(eps))


def _dense(w: _Writer, var: relax.Var, call: relax.Call, *, activation: str, **_quantisation: Any) -> str:
    weight = w.constant(weight_of(w.graph, call.args[1]).T, name=var.name + "_weight")
    product = w.node("MatMul", w.value(call.args[0]), weight, name=var.name)
    y = _activated(w, w.node("Add", product, w.constant(w.array(call.args[2]))), activation)
    return y if len(call.args) == 3 else w.node("Add", y, w.value(call.args[3]))


def _activate(w: _Writer, _var: relax.Var, call: relax.Call, *, kind: str) -> str:
    return _activated(w, w.value(call.args[0]), kind)


def _activated(w: _Writer, x: str, kind: str) -> str:
    match kind:
        case "none":
            return x
        case "relu":
            return w.node("Relu", x)
        case "tanh":
            return w.node("Tanh", x)
        case "gelu":
            erf = w.node("Erf", w.node("Div", x, w.constant(math.sqrt(2.0))))
            return w.node("Mul", w.node("Mul", x, w.node("Add", erf, w.constant(1.0))), w.constant(0.5))
        case "gelu_tanh":
            cubed = w.node("Mul", w.constant(0.044715), w.node("Pow", x, w.constant(3.0)))
            inner = w.node("Mul", w.constant(math.sqrt(2 / math.pi)), w.node("Add", x, cubed))
            gate = w.node("Add", w.constant(1.0), w.node("Tanh", inner))
            return w.node("Mul", w.node("Mul", w.constant(0.5), x), gate)
        case _:
            raise ValueError(f"activation {kind!r} is not known")


def _attention(w: _Writer, var: relax.Var, call: relax.Call, *, heads: int, scale: float) -> str:
    q, k, v = (w.value(a) for a in call.args[:3])
    return _attended(w, var, (q, k, v), dialect.shape_of(call.args[0])[1], int(heads), float(scale))


def _self_attention(
    w: _Writer, var: relax.Var, call: relax.Call, *, heads: int, scale: float, **_quantisation: Any
) -> str:
    channels = dialect.shape_of(call.args[0])[1] // 3
    parts = [f"{var.name}_{part}" for part in "qkv"]
    w.nodes.append(
        helper.make_node("Split", [w.value(call.args[0]), w.constant([channels] * 3, np.int64)], parts, axis=-1)
    )
    return _attended(w, var, (parts[0], parts[1], parts[2]), channels, int(heads), float(scale))


def _attended(w: _Writer, var: relax.Var, qkv: tuple[str, str, str], channels: int, heads: int, scale: float) -> str:
    split = w.constant([0, 0, heads, channels // heads], np.int64)
    q, k, v = (
        w.node("Transpose", w.node("Reshape", x, split), perm=perm)
        for x, perm in zip(qkv, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    scores = w.node("Div", w.node("MatMul", q, k), w.constant(1.0 / scale))
    shares = w.node("Softmax", w.node("Add", scores, w.additive_mask()), axis=-1)
    context = w.node("Transpose", w.node("MatMul", shares, v), perm=[0, 2, 1, 3])
    return w.node("Reshape", context, w.constant([0, 0, channels], np.int64), name=var.name)


def _stack(w: _Writer, _var: relax.Var, call: relax.Call) -> str:
    return w.node("Concat", *(w.value(a) for a in call.args), axis=-1)


def _add(w: _Writer, _var: relax.Var, call: relax.Call) -> str:
    return w.node("Add", w.value(call.args[0]), w.value(call.args[1]))


def _pool(w: _Writer, _var: relax.Var, call: relax.Call, *, mode: str) -> str:
    x, rows = w.value(call.args[0]), w.constant([1], np.int64)
    match mode:
        case "cls":
            return w.node("Gather", x, w.constant(0, np.int64), axis=1)
        case "mean":
            total = w.node("ReduceSum", w.node("Mul", x, w.column_mask()), rows, keepdims=0)
            count = w.node("ReduceSum", w.column_mask(), rows, keepdims=0)
            return w.node("Div", total, w.node("Clip", count, w.constant(1e-9)))
        case _:
            low = w.node("Mul", w.node("Sub", w.constant(1.0), w.column_mask()), w.constant(-1e9))
            return w.node("ReduceMax", w.node("Add", x, low), axes=[1], keepdims=0)


def _normalize(w: _Writer, _var: relax.Var, call: relax.Call) -> str:
    x = w.value(call.args[0])
    norm = w.node("ReduceL2", x, axes=[-1], keepdims=1)
    return w.node("Div", x, w.node("Clip", norm, w.constant(1e-12)))


_OPS: dict[str, Callable[..., str]] = {
    "embed": _embed,
    "dense": _dense,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "self_attention": _self_attention,
    "stack": _stack,
    "activate": _activate,
    "add": _add,
    "pool": _pool,
    "normalize": _normalize,
}
