"""Fuse an activation into the dense layer before it.

Before: ``y = activate(dense(x, w, b), kind=k)`` where nothing else uses the dense result and it has no activation or
residual of its own. After: ``y = dense(x, w, b, activation=k)``.
"""

from __future__ import annotations

from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite


def fuse_activations(module: IRModule) -> IRModule:
    """Rewrite every pair the module docstring describes."""
    graph = Graph(module)

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if not is_call(call, dialect.ACTIVATE):
            return call
        before = graph.sole_producer(graph.values[var].args[0], dialect.DENSE)
        if before is None or attributes(before)["activation"] != "none" or len(before.args) != 3:
            return call
        fused = builder.lookup_binding(call.args[0])
        return dialect.dense(*fused.args, **{**attributes(fused), "activation": attributes(call)["kind"]})

    return rewrite(module, visit)
