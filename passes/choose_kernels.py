"""Choose between a dense and a block-sparse kernel for every integer dense layer.

The zeros are the ones the integer weight has. For each block height R the share of R × 4 blocks that hold anything is
the work a sparse kernel does; the cost model of ``whet.schedules`` weighs that against the dense kernel. After this
pass a layer that runs sparse has the attribute ``block_rows`` = R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax

from whet.schedules.cost import estimate_cycles
from whet.schedules.dense import DenseSpec
from whet.schedules.isa import Isa

from . import dialect
from .graph import Graph, attributes, is_call, rewrite

BLOCK_ROWS = (1, 2, 4, 8, 16)
CLEARLY = 0.9
"""A sparse kernel must be estimated to take less than this share of the dense one's time: estimates are not exact."""
TYPICAL_TILES = 4
"""The choice is made for requests of 64 tokens; it seldom depends on it."""


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
        return dialect.dense(*call.args, **attrs, block_rows=choice.block_rows) if choice.block_rows else call

    return rewrite(module, visit), choices


def _choose(layer: str, values: np.ndarray[Any, Any], isa: Isa) -> Choice:
    rows, columns = values.shape
    densities = {r: block_density(values, r) for r in BLOCK_ROWS}
    cycles = {"dense": estimate_cycles(DenseSpec(rows, columns, "i8"), TYPICAL_TILES, 1.0, isa)}
    for r, density in densities.items():
        cycles[f"{r}x4"] = estimate_cycles(
            DenseSpec(rows, columns, "i8_sparse", block_rows=r), TYPICAL_TILES, density, isa
        )
    best = min(cycles, key=lambda name: cycles[name])
    block_rows = int(best.partition("x")[0]) if cycles[best] < CLEARLY * cycles["dense"] else 0
    density = densities.get(block_rows, 1.0)
    return Choice(layer, rows, columns, float((values == 0).mean()), block_rows, density, cycles)


def block_density(values: np.ndarray[Any, Any], block_rows: int) -> float:
    """Share of the ``block_rows`` × 4 blocks of an int8 ``(N, K)`` weight that are not all zero."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % block_rows), (0, 0)))
    blocks = padded.reshape(-1, block_rows, columns // 4, 4)
    return float((blocks != 0).any(axis=(1, 3)).mean())
