"""Choose between a dense and a block-sparse kernel for every integer dense layer.

The zeros are the ones the integer weight has. For each shape R × C of blocks the share of those that hold anything is
the work a sparse kernel does; the cost model of ``whet.schedules`` weighs that against the dense kernel. After this
pass a layer whose zeros are left out has the attributes ``block_rows`` = R and ``block_columns`` = C, and ``expanded``
if they are left out of memory only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax

from whet.schedules.cost import estimate_cycles
from whet.schedules.dense import BLOCKS, DenseSpec, supports
from whet.schedules.isa import TILE, Isa

from . import dialect
from .graph import Graph, attributes, is_call, is_per_request, rewrite

CLEARLY = 0.9
"""A sparse kernel must be estimated to take less than this share of the dense one's time: estimates are not exact."""
SLIGHTLY = 0.97
"""An expanded one, less than this: it is the dense kernel with fewer bytes to wait for, and a smaller file."""
NEARLY = 1.05
"""Of sparse kernels whose estimates are this close the one with the largest blocks, up to 8 × 4, is taken: less to
index."""
TYPICAL_TOKENS = 64
"""Of a call, unless the user says otherwise. On AMX kernels depend on it: many tokens favour dense products."""


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
    expanded: bool
    """Whether zeros are left out of memory only, not of the arithmetic."""
    kernel: str
    """The name of the candidate with these blocks."""
    density: float
    """Share of the blocks that are computed."""
    cycles: dict[str, float]
    """The cost model's estimate per candidate (``"dense"``, ``"4x4 sparse"``, ``"1x1 expanded"``, …)."""


def choose_kernels(module: IRModule, isa: Isa, tokens: int = TYPICAL_TOKENS) -> tuple[IRModule, list[Choice]]:
    """Say which kernel computes each layer where that is not the dense one, for calls of so many tokens.

    Returns the choices too.
    """
    graph = Graph(module)
    choices: list[Choice] = []

    def visit(_builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        attrs = attributes(call) if is_call(call, dialect.DENSE) else {}
        if "x_scale" not in attrs and "per_token" not in attrs:
            return call
        weight = graph.constant(graph.producer(graph.values[var].args[1]).args[0])
        # What runs once per request fills one tile, unless a call has more than 16 of them.
        tiles = 1 if is_per_request(graph, var) else math.ceil(tokens / TILE)
        choice = _choose(var.name, weight, isa, tiles)
        choices.append(choice)
        if not choice.block_rows:
            return call
        attrs |= {"block_rows": choice.block_rows, "block_columns": choice.block_columns}
        if choice.expanded:
            attrs["expanded"] = True
        return dialect.dense(*call.args, **attrs)

    return rewrite(module, visit), choices


def _choose(layer: str, values: np.ndarray[Any, Any], isa: Isa, tiles: int) -> Choice:
    rows, columns = values.shape
    dense = estimate_cycles(DenseSpec(rows, columns, "i8"), tiles, 1.0, isa)
    specs = [DenseSpec(rows, columns, weight, *block) for weight, blocks in BLOCKS.items() for block in blocks]
    kernels = {(*spec.block, spec.weight == "i8_expanded"): spec for spec in specs if supports(spec, isa)}
    densities = {block: block_density(values, *block) for block in {spec.block for spec in kernels.values()}}
    # A block never took less than its share of the dense kernel's time, whatever the estimates say.
    cycles = {
        kernel: max(estimate_cycles(spec, tiles, densities[spec.block], isa), densities[spec.block] * dense)
        for kernel, spec in kernels.items()
    }
    least = min(cycles.values())
    chosen = min(cycles, key=lambda kernel: _rank(kernel, cycles[kernel], least))
    density = densities[chosen[:2]]
    expanded = chosen[2]
    if cycles[chosen] >= (SLIGHTLY if expanded else CLEARLY) * dense:
        chosen, density = (0, 0, False), 1.0
    named = {"dense": dense, **{_candidate(*kernel): value for kernel, value in cycles.items()}}
    return Choice(layer, rows, columns, float((values == 0).mean()), *chosen, _candidate(*chosen), density, named)


def _rank(kernel: tuple[int, int, bool], cycles: float, least: float) -> tuple[bool, bool, float]:
    """What makes a candidate better, the most important first; less is better."""
    rows, columns, expanded = kernel
    return cycles > NEARLY * least, expanded, cycles if expanded else -min(rows * columns, 32)


def _candidate(block_rows: int, block_columns: int, expanded: bool) -> str:
    """Name a kernel; 0 rows stand for dense."""
    if not block_rows:
        return "dense"
    return f"{block_rows}x{block_columns} {'expanded' if expanded else 'sparse'}"


def block_density(values: np.ndarray[Any, Any], block_rows: int, block_columns: int) -> float:
    """Share of the ``block_rows`` × ``block_columns`` blocks of an int8 ``(N, K)`` weight that are not all zero."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % block_rows), (0, 0)))
    blocks = padded.reshape(-1, block_rows, columns // block_columns, block_columns)
    return float((blocks != 0).any(axis=(1, 3)).mean())
