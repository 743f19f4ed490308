"""Prune the blocks of one layer from second moments of its input, and make the kept weights answer for the rest.

The layer is y = W x + b with x of ``K`` channels. What it should give is t, for instance the dense model's y. Kept
weights W' minimise

    E‖t − W' x − b'‖² + λ ‖W − W'‖²

over texts: per group of R rows with the kept channels S this is a linear system, W'_S = G_S (H_SS)⁻¹ with
H = Cov(x) + λI and G = Cov(t, x) + λW. Removing a block B of four channels from S raises the loss of a row by
w_B ((H_SS⁻¹)_BB)⁻¹ w_Bᵀ, the saliency of the Optimal Brain Surgeon (Hassibi and Stork 1993) for a group of weights;
Optimal Brain Compression (Frantar and Alistarh 2022) and SparseGPT (Frantar and Alistarh 2023) prune by it, one weight
or one column at a time. Here blocks go in a few rounds, each followed by the exact solution, so that the order of
columns does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import COLUMNS, Block
from .masks import keep_best

ROUND = 0.8
"""Share of the blocks that a round of removals keeps."""
LEAST = 0.5
"""No group of rows keeps fewer blocks than this share of what it would keep if all kept as many."""


class Moments:
    """Sums over tokens that say how a layer's input x ``(K,)`` and its wanted output t ``(N,)`` vary together."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        zeros = {"dtype": torch.float64, "device": device}
        self.x, self.t = torch.zeros(inputs, **zeros), torch.zeros(outputs, **zeros)  # type: ignore[arg-type]
        self.xx = torch.zeros(inputs, inputs, **zeros)  # type: ignore[arg-type]
        self.tx = torch.zeros(outputs, inputs, **zeros)  # type: ignore[arg-type]
        self.tt = torch.zeros(outputs, **zeros)  # type: ignore[arg-type]

    def add(self, x: Tensor, t: Tensor) -> None:
        """Count tokens: ``x`` float ``(tokens, K)``, ``t`` float ``(tokens, N)``."""
        x, t = x.float(), t.float()
        self.count += len(x)
        self.x += x.sum(0)
        self.t += t.sum(0)
        self.xx += x.T @ x
        self.tx += t.T @ x
        self.tt += t.square().sum(0)

    def split(self, sizes: Sequence[int]) -> list[Moments]:
        """Those of layers that share the input and whose outputs stand one after the other in t."""
        parts = []
        for t, tx, tt in zip(self.t.split(sizes), self.tx.split(sizes), self.tt.split(sizes), strict=True):
            part = copy(self)
            part.t, part.tx, part.tt = t, tx, tt
            parts.append(part)
        return parts


@dataclass(frozen=True)
class Reconstruction:
    """A pruned layer."""

    weight: Tensor
    """Float ``(N, K)``."""
    bias: Tensor
    """Float ``(N,)``."""
    keep: Tensor
    """Bool ``(N / R, K / 4)``."""
    error: float
    """Squared error of the output over its variance, on the texts of the moments."""
    curve: Tensor
    """Float ``(n,)``: an estimate of what ``error`` is after 0, 1, … blocks have been removed."""


def reconstruct(
    weight: Tensor, moments: Moments, block: Block, sparsity: float, damping: float, deepest: float = 0.0
) -> Reconstruction:
    """Prune a layer to ``sparsity`` of its blocks; follow removals on to ``deepest``, for the curve.

    ``weight`` is float ``(N, K)``; zero blocks stay zero. ``damping`` is λ as a share of the mean variance of x: it
    keeps weights near the old ones in directions that the texts hardly show. With sparsity 0 weights only adapt.
    """
    count = moments.count
    mean_x, mean_t = moments.x / count, moments.t / count
    covariance = moments.xx / count - torch.outer(mean_x, mean_x)
    shift = damping * float(covariance.diagonal().mean()) + 1e-12
    h = covariance + shift * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    cross = moments.tx / count - torch.outer(mean_t, mean_x)
    g = cross + shift * weight.double()

    present = block.held(weight)
    keep, costs = present, present.new_zeros(0, dtype=torch.float32)
    if max(sparsity, deepest) > 1 - float(present.double().mean()):
        cost = _costs(h, g, present, block, max(sparsity, deepest))
        keep = keep_best({"": cost}, max(sparsity, 1 - float(present.double().mean())))[""]
        costs = cost[cost.isfinite()].sort().values
    solved = _solve(h, g, keep, block)
    bias = mean_t - solved @ mean_x
    variance = max(float((moments.tt / count - mean_t**2).sum()), 1e-12)
    residual = variance - 2 * float((solved * cross).sum()) + float(((solved @ covariance) * solved).sum())
    curve = torch.cat([costs.new_zeros(1), costs.cumsum(0)]) / variance
    return Reconstruction(solved.float(), bias.float(), keep, residual / variance, curve)


def _costs(h: Tensor, g: Tensor, present: Tensor, block: Block, sparsity: float) -> Tensor:
    """What it costs to remove each block: infinity where none has to be removed, minus infinity where there is none.

    Ranked over the layer, they share its budget out among the groups of rows.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).float()
    weight = (g.float() @ inverse).view(len(present), block.rows, -1)
    cost = torch.full(present.shape, torch.inf, device=h.device).masked_fill(~present, -torch.inf)
    for own, blocks, costs in zip(weight, present, cost, strict=True):
        _remove(own, inverse, blocks, costs, least=round(LEAST * (1 - sparsity) * len(blocks)))
    return cost


def _remove(weight: Tensor, inverse: Tensor, present: Tensor, cost: Tensor, least: int) -> None:
    """Remove the blocks of a group of rows down to ``least``, the least salient first; ``cost`` gets what each cost.

    ``weight`` ``(R, K)`` is the unpruned solution. Between rounds the solution and the inverse of H become those of the
    channels that are left (block elimination). Costs do not fall, so that ranking them keeps the order of removal.
    """
    left, stay, reached = torch.arange(len(present), device=present.device), present, 0.0
    while int(stay.sum()) > least:
        if not bool(stay.all()):
            kept, gone = _channels(stay), _channels(~stay)
            between = _part(inverse, gone, kept)
            step = torch.cholesky_solve(between, torch.linalg.cholesky(_part(inverse, gone, gone)))
            weight = weight.index_select(1, kept) - weight.index_select(1, gone) @ step
            inverse = _part(inverse, kept, kept).addmm_(between.T, step, alpha=-1)
            left = left[stay]
        saliency = _saliency(weight, inverse)
        order = saliency.argsort(stable=True)[: max(1, round((1 - ROUND) * len(left)))]
        cost[left[order]] = saliency[order].clamp(min=reached)
        reached = float(cost[left[order[-1]]])
        stay = torch.ones_like(left, dtype=torch.bool)
        stay[order] = False


def _part(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``matrix[rows][:, columns]``, which takes several times as long."""
    return matrix.index_select(0, rows).index_select(1, columns)


def _channels(blocks: Tensor) -> Tensor:
    """The numbers of the channels in the blocks of a mask."""
    return blocks.repeat_interleave(COLUMNS).nonzero().flatten()


def _saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """What the loss rises by without each block, ``(blocks,)``, of rows ``(R, channels)``."""
    size = inverse.shape[0] // COLUMNS
    own = inverse.view(size, COLUMNS, size, COLUMNS).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(-1, size, COLUMNS)
    return torch.einsum("rbc,bcd,rbd->b", parts, torch.linalg.inv(own), parts)


def _solve(h: Tensor, g: Tensor, keep: Tensor, block: Block) -> Tensor:
    """The best weights ``(N, K)`` with the kept blocks."""
    weight = torch.zeros_like(g)
    patterns, group_of = keep.unique(dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        groups = (group_of == i).nonzero().flatten()
        channels = _channels(pattern)
        if len(channels):
            rows = (groups[:, None] * block.rows + torch.arange(block.rows, device=groups.device)).flatten()
            factor = torch.linalg.cholesky(_part(h, channels, channels))
            weight[rows[:, None], channels] = torch.cholesky_solve(g[rows][:, channels].T, factor).T
    return weight
