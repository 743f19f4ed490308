"""Divide outlier channels before they are rounded, and multiply the weights that read them.

Before: fp32 dialect after the fusions. After: where ``quantise`` will round the input of a dense layer with one scale
for all tokens, its outlier channels go through ``scale_channels``, and the layer's weight has the inverse factors in
its columns: the model computes what it did. A channel is an outlier as far as it exceeds twice the median of what the
channels reach.

The method is that of Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145), which scales outlier channels only;
SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) scales all. Both need an op before that can absorb the factors exactly,
which a GELU, and a layer norm whose result is also a residual, cannot. Here the kernel that rounds absorbs them: it
multiplies each channel by a number of its own anyway. Where it has one number for all (attention), and where the weight
was integer in the source, all stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .calibrate import Array, run
from .graph import Graph, attributes, is_call, rewrite
from .quantise import QuantisationConfig, integer_layers, is_dynamic

REACH = 2.0
"""Channels may reach so many times as far as the median channel. The error hardly changes between 1.25 and 3."""


def smooth_outliers(
    module: IRModule,
    config: QuantisationConfig,
    requests: Sequence[np.ndarray[Any, Any]],
    token_types: Sequence[np.ndarray[Any, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> IRModule:
    """Watch ``module`` on ``requests`` (1-D arrays of token ids) and rewrite it as the module docstring says."""
    graph = Graph(module)
    layers = {var: call.args[0] for var, call in integer_layers(graph).items() if _can_smooth(graph, call, config)}
    reach: dict[str, Array] = {}
    inputs = {x.name for x in layers.values()}

    def watch(name: str, rows: Array) -> None:
        if name in inputs:
            reach[name] = np.maximum(np.abs(rows).max(axis=0), reach.get(name, 0))

    run(module, requests, token_types, watch, progress)

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if var not in layers:
            return call
        x = layers[var].name
        excess = reach[x] / (REACH * max(float(np.median(reach[x])), 1e-8))
        excess = np.maximum(excess, 1).astype(np.float32)
        if (excess == 1).all():
            return call
        scaled = builder.emit(dialect.scale_channels(call.args[0], relax.const(1 / excess)), name_hint=x + "_smooth")
        weight = relax.const(graph.constant(graph.values[var].args[1]) * excess)
        return dialect.dense(scaled, weight, *call.args[2:], **attributes(call))

    return rewrite(module, visit)


def _can_smooth(graph: Graph, call: relax.Call, config: QuantisationConfig) -> bool:
    """Whether the layer's input is rounded with one scale for all tokens, for it alone, by a kernel that can scale."""
    x = call.args[0]
    made = graph.producer(x)
    readers = [b.value for b in graph.bindings if is_call(b.value, dialect.DENSE) and b.value.args[0].same_as(x)]
    by_attention = is_call(made, dialect.SELF_ATTENTION) or is_call(made, dialect.ATTENTION)
    integer_source = is_call(graph.producer(call.args[1]), dialect.QUANTIZED_WEIGHT)
    return not is_dynamic(graph, call, config) and len(readers) == 1 and not by_attention and not integer_source
