"""One-shot magnitude pruning of R × 4 blocks, for experiments with speed.

Every quantisable dense weight loses the given share of its R output × 4 input blocks, the ones with the smallest mean
magnitude (the block score of Fast DistilBERT on CPUs, section 3, without its gradual schedule and distillation: real
accuracy at high sparsity needs those). A weight whose sizes the block does not divide stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, is_call, is_per_token, rewrite, weight_of


def prune_blocks(module: IRModule, sparsity: float, block_rows: int = 4) -> IRModule:
    """Set ``sparsity`` (0 to 1) of the blocks of each per-token dense weight, heads excepted, to zero."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}; expected a share of at least 0 and below 1")
    if block_rows not in (1, 2, 4, 8, 16):
        raise ValueError(f"block_rows is {block_rows}; expected 1, 2, 4, 8 or 16")
    graph = Graph(module)
    result = graph.source(graph.result)

    def visit(_builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if not is_call(call, dialect.DENSE) or var.same_as(result) or not is_per_token(graph, var):
            return call
        weight = weight_of(graph, graph.values[var].args[1])
        if weight.shape[0] % block_rows or weight.shape[1] % 4:
            return call
        pruned = relax.const(prune(weight, sparsity, block_rows))
        return relax.Call(call.op, [call.args[0], pruned, *call.args[2:]], call.attrs)

    return rewrite(module, visit)


def prune(weight: np.ndarray[Any, Any], sparsity: float, block_rows: int) -> np.ndarray[Any, Any]:
    """A copy of a float32 ``(N, K)`` weight whose weakest blocks are zero."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // block_rows, block_rows, columns // 4, 4)
    score = np.abs(blocks).mean(axis=(1, 3))
    weakest = np.argsort(score, axis=None, kind="stable")[: round(sparsity * score.size)]
    keep = np.ones(score.size, bool)
    keep[weakest] = False
    kept = blocks * keep.reshape(score.shape)[:, None, :, None]
    return np.ascontiguousarray(kept.reshape(rows, columns), dtype=np.float32)
