"""Let dense layers and attention multiply in bfloat16.

Before: fp32 dialect after the fusions. After: every dense layer that gains by it has the attribute ``bf16``: its input
and its weight are rounded to bfloat16, the sums and all that follows stay float32. So has every self-attention between
two such layers, for Q, K, V and the probabilities. What stays float32 is decided as for integers, see ``quantise``.
"""

from __future__ import annotations

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite, weight_of
from .quantise import integer_layers, joins_its_layers

SPARSE = 0.5
"""Share of zeros that no weight has by accident."""


def round_to_bf16(module: IRModule) -> IRModule:
    """Rewrite as the module docstring says."""
    graph = Graph(module)
    layers = integer_layers(graph)
    attentions = {b.var for b in graph.bindings if joins_its_layers(graph, layers, b.var, b.value)}

    def visit(_builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if var in layers:
            return dialect.dense(*call.args, **attributes(call) | {"bf16": True})
        if var in attentions:
            return dialect.self_attention(*call.args, **attributes(call) | {"bf16": True})
        return call

    return rewrite(module, visit)


def share_of_zeros(module: IRModule) -> float:
    """Share of zeros in the weights of all dense layers."""
    graph = Graph(module)
    weights = [weight_of(graph, b.value.args[1]) for b in graph.bindings if is_call(b.value, dialect.DENSE)]
    zeros = sum(weight.size - np.count_nonzero(weight) for weight in weights)
    return zeros / max(1, sum(weight.size for weight in weights))
