"""Fuse the addition of a residual into the dense layer that makes one of its sides.

Before: ``y = add(dense(x, w, b), h)`` (either order) where nothing else uses the dense result. After:
``y = dense(x, w, b, h)``. ``h`` must be bound before the dense layer's use, which the straight line guarantees.
"""

from __future__ import annotations

from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite


def fuse_residuals(module: IRModule) -> IRModule:
    """Rewrite every pair the module docstring describes."""
    graph = Graph(module)

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if not is_call(call, dialect.ADD):
            return call
        for side, other in ((0, 1), (1, 0)):
            before = graph.sole_producer(graph.values[var].args[side], dialect.DENSE)
            if before is not None and len(before.args) == 3:
                fused = builder.lookup_binding(call.args[side])
                x, weight, bias = fused.args
                return dialect.dense(x, weight, bias, call.args[other], **attributes(fused))
        return call

    return rewrite(module, visit)
