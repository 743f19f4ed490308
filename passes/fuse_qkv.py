"""Fuse the Q, K and V projections of an attention into one dense layer.

Before: ``attention(dense(x, wq, bq), dense(x, wk, bk), dense(x, wv, bv), segments)``. After:
``self_attention(dense(x, [wq; wk; wv], [bq; bk; bv]), segments)``. Where the three do not come from dense layers of the
same value, they are stacked instead, so that after this pass no ``attention`` is left.
"""

from __future__ import annotations

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite, weight_of


def fuse_qkv(module: IRModule) -> IRModule:
    """Rewrite every attention as the module docstring describes."""
    graph = Graph(module)

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if not is_call(call, dialect.ATTENTION):
            return call
        makers = [graph.sole_producer(a, dialect.DENSE) for a in graph.values[var].args[:3]]
        old = [d for d in makers if d is not None and _plain(d)]
        name = var.name + "_qkv"
        if len(old) == 3 and len({d.args[0] for d in old}) == 1:
            x = builder.lookup_binding(call.args[0]).args[0]
            weight = _stacked_weight(graph, builder, [d.args[1] for d in old])
            bias = relax.const(np.concatenate([graph.constant(d.args[2]) for d in old]))
            qkv = builder.emit(dialect.dense(x, weight, bias), name_hint=name)
        else:
            qkv = builder.emit(dialect.stack(*call.args[:3]), name_hint=name)
        return dialect.self_attention(qkv, call.args[3], **attributes(call))

    return rewrite(module, visit)


def _plain(dense: relax.Call) -> bool:
    return len(dense.args) == 3 and attributes(dense)["activation"] == "none"


def _stacked_weight(graph: Graph, builder: relax.BlockBuilder, weights: list[relax.Expr]) -> relax.Expr:
    """One weight from three; integers stay integers only if all three are."""
    made = [graph.producer(w) for w in weights]
    if all(is_call(m, dialect.QUANTIZED_WEIGHT) for m in made):
        values, scale = (np.concatenate([graph.constant(m.args[i]) for m in made]) for i in (0, 1))
        return builder.emit(dialect.quantized_weight(relax.const(values), relax.const(scale)))
    return relax.const(np.concatenate([weight_of(graph, w) for w in weights]))
