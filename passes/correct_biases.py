"""Add to biases what rounding has taken from the mean of each layer's output.

Before: the dialect after ``quantise``, and the float graph that it was made of. After: on the calibration requests the
mean of every channel of an integer layer without activation, residual included, is that of the float graph.

Rounding errors do not average out where an activation is clipped or where a token always has the same outlier. This is
the empirical bias correction of Nagel et al. 2019 (arXiv 1906.04721, appendix D), layer after layer: each is corrected
for what those before it have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, attributes, is_call, rewrite
from .interpret import Rows, interpret

MOST_TOKENS = 4096
"""Tokens of calibration requests that means are taken of, in one run."""


def correct_biases(
    module: IRModule,
    reference: IRModule,
    requests: Sequence[np.ndarray[Any, Any]],
    token_types: Sequence[np.ndarray[Any, Any]] | None = None,
) -> IRModule:
    """Run both graphs on ``requests`` (1-D arrays of token ids) and rewrite ``module`` as the module docstring says."""
    graph = Graph(module)
    layers = {b.var.name for b in graph.bindings if is_call(b.value, dialect.DENSE) and _is_linear(b.value)}
    count = max(1, sum(1 for total in accumulate(map(len, requests)) if total <= MOST_TOKENS))
    sample = requests[:count], None if token_types is None else token_types[:count]
    wanted: dict[str, Rows] = {}
    missing: dict[str, Rows] = {}

    def note(name: str, rows: Rows) -> None:
        if name in layers:
            wanted[name] = rows.mean(axis=0)

    def correct(name: str, rows: Rows) -> None:
        if name in layers:
            missing[name] = wanted[name] - rows.mean(axis=0)
            rows += missing[name]

    for each, observe in ((reference, note), (module, correct)):
        interpret(each, *sample, observe, chunk_tokens=MOST_TOKENS)

    def visit(_builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if var.name not in missing:
            return call
        args = list(call.args)
        args[2] = relax.const(graph.constant(graph.values[var].args[2]) + missing[var.name])
        return dialect.dense(*args, **attributes(call))

    return rewrite(module, visit)


def _is_linear(dense: relax.Call) -> bool:
    """Whether a layer is integer and has no activation, behind which a bias could not be seen."""
    attrs = attributes(dense)
    return attrs["activation"] == "none" and ("x_scale" in attrs or "per_token" in attrs)
