"""Pad attention heads to a multiple of 4 channels, which the attention kernels need (TinyBERT has heads of 26).

Before: ``dense(self_attention(dense(x, wqkv, bqkv), segments), wo, bo)`` with a head size that is no multiple of 4.
After: the same with zero rows in ``wqkv`` and ``bqkv`` and zero columns in ``wo``: scores and results are unchanged.
Needs ``fuse_qkv`` first. A head size that needs padding but does not stand between two dense layers is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite


def pad_heads(module: IRModule) -> IRModule:
    """Rewrite every attention whose head size is not a multiple of 4."""
    graph = Graph(module)
    narrow: dict[relax.Var, tuple[int, int]] = {}
    """Attentions to pad: heads and head size."""
    for binding in graph.bindings:
        if is_call(binding.value, dialect.SELF_ATTENTION):
            heads = int(attributes(binding.value)["heads"])
            size = dialect.shape_of(binding.var)[1] // heads
            if size % 4:
                narrow[binding.var] = (heads, size)
    if not narrow:
        return module
    projections = {graph.values[var].args[0]: shape for var, shape in narrow.items()}

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        old = graph.values[var]
        if var in projections:
            if graph.sole_producer(var, dialect.DENSE) is None:
                raise ValueError(
                    f"{var.name}: heads of {projections[var][1]} channels can only be padded after a dense layer"
                )
            heads, size = projections[var]
            weight = _weight(graph, builder, old.args[1], lambda a: _pad(a, (3, heads, size), axis=0))
            bias = relax.const(_pad(graph.constant(old.args[2]), (3, heads, size), axis=0))
            return dialect.dense(call.args[0], weight, bias, **attributes(call))
        if is_call(call, dialect.DENSE) and old.args[0] in narrow:
            heads, size = narrow[old.args[0]]
            weight = _weight(graph, builder, old.args[1], lambda a: _pad(a, (heads, size), axis=1))
            return dialect.dense(call.args[0], weight, *call.args[2:], **attributes(call))
        if any(a in narrow for a in old.args if isinstance(a, relax.Var)):
            raise ValueError(f"{var.name}: reads attention with heads that are no multiple of 4, but is no dense layer")
        return call

    return rewrite(module, visit)


def _pad(array: np.ndarray[Any, Any], split: tuple[int, ...], axis: int) -> np.ndarray[Any, Any]:
    """Split ``axis`` into ``split``, pad its last part to a multiple of 4 with zeros, and join it again."""
    shape = array.shape
    wide = array.reshape(*shape[:axis], *split, *shape[axis + 1 :])
    padding = [(0, 0)] * wide.ndim
    padding[axis + len(split) - 1] = (0, -split[-1] % 4)
    return np.ascontiguousarray(np.pad(wide, padding).reshape(*shape[:axis], -1, *shape[axis + 1 :]))


def _weight(graph: Graph, builder: relax.BlockBuilder, weight: relax.Expr, change: Any) -> relax.Expr:
    """``change`` applied to a weight, in float32 or in integers with their scales."""
    made = graph.producer(weight)
    if not is_call(made, dialect.QUANTIZED_WEIGHT):
        return relax.const(change(graph.constant(made)))
    values, scale = graph.constant(made.args[0]), graph.constant(made.args[1])
    padded = change(values)
    if padded.shape[0] != values.shape[0]:
        scale = change(scale)
        scale[scale == 0] = 1.0
    return builder.emit(dialect.quantized_weight(relax.const(padded), relax.const(scale)))
