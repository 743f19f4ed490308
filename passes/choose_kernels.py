"""Choose between a dense and a block-sparse kernel for every integer dense layer.

The zeros are the ones the integer weight has. For each shape R × C of blocks the share of those that hold anything is
the work a sparse kernel does; the cost model of ``whet.schedules`` weighs that against the dense kernel. After this
pass a layer that runs sparse has the attributes ``block_rows`` = R and ``block_columns`` = C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax

from whet.schedules.cost import estimate_cycles
from whet.schedules.dense import BLOCKS, DenseSpec
from whet.schedules.isa import Isa

from . import dialect
from .graph import Graph, attributes, is_call, rewrite

CLEARLY = 0.9
"""A sparse kernel must be estimated to take less than this share of the dense one's time: estimates are not exact."""
NEARLY = 1.05
"""Of kernels whose estimates are this close the one with the largest blocks, up to 8 × 4, is taken: less to index."""
TYPICAL_TILES = 4
"""The choice is made for requests of 64 tokens. Only on AMX it depends on it: longer ones favour dense kernels."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer, and what it was chosen over."""

    layer: str
    out_features: int
    in_features: int
    zeros: float
    """Share of zero weights."""
    block_rows: int
    """0: dense."""
    block_columns: int
    density: float
    """Share of the blocks that are computed."""
    cycles: dict[str, float]
    """The cost model's estimate per candidate (``"dense"``, ``"4x4"``, …)."""


def choose_kernels(module: IRModule, isa: Isa) -> tuple[IRModule, list[Choice]]:
    """Set ``block_rows`` where a sparse kernel is estimated to be faster; returns the choices too."""
    graph = Graph(module)
    choices: list[Choice] = []

    def visit(_builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        attrs = attributes(call) if is_call(call, dialect.DENSE) else {}
        if "x_scale" not in attrs and "per_token" not in attrs:
            return call
        choice = _choose(var.name, graph.constant(graph.producer(graph.values[var].args[1]).args[0]), isa)
        choices.append(choice)
        if not choice.block_rows:
            return call
        attrs |= {"block_rows": choice.block_rows, "block_columns": choice.block_columns}
        return dialect.dense(*call.args, **attrs)

    return rewrite(module, visit), choices


def _choose(layer: str, values: np.ndarray[Any, Any], isa: Isa) -> Choice:
    rows, columns = values.shape
    dense = estimate_cycles(DenseSpec(rows, columns, "i8"), TYPICAL_TILES, 1.0, isa)
    densities = {block: block_density(values, *block) for block in BLOCKS}
    # A block never took less than its share of the dense kernel's time, whatever the estimates say.
    sparse = {
        (r, c): max(
            estimate_cycles(DenseSpec(rows, columns, "i8_sparse", r, c), TYPICAL_TILES, density, isa), density * dense
        )
        for (r, c), density in densities.items()
    }
    least = min(sparse.values())
    block = min(sparse, key=lambda b: (sparse[b] > NEARLY * least, -min(b[0] * b[1], 32)))
    density = densities[block]
    if sparse[block] >= CLEARLY * dense:
        block, density = (0, 0), 1.0
    cycles = {"dense": dense, **{f"{r}x{c}": value for (r, c), value in sparse.items()}}
    return Choice(layer, rows, columns, float((values == 0).mean()), *block, density, cycles)


def block_density(values: np.ndarray[Any, Any], block_rows: int, block_columns: int) -> float:
    """Share of the ``block_rows`` × ``block_columns`` blocks of an int8 ``(N, K)`` weight that are not all zero."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % block_rows), (0, 0)))
    blocks = padded.reshape(-1, block_rows, columns // block_columns, block_columns)
    return float((blocks != 0).any(axis=(1, 3)).mean())
