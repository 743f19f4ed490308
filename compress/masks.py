"""Which blocks to keep, by their scores; and how sparsity grows."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_best(scores: dict[str, Tensor], sparsity: float, everywhere: bool = False) -> dict[str, Tensor]:
    """Keep all but the share ``sparsity`` of the blocks, those with the lowest scores.

    ``everywhere`` ranks the blocks of all weights together; else each weight loses its share. A block whose score is
    minus infinity is never kept. Ties are broken by position, so the result is the same everywhere.
    """
    if everywhere:
        names = list(scores)
        flat = _keep(torch.cat([scores[name].flatten() for name in names]), sparsity)
        parts = flat.split([scores[name].numel() for name in names])
        return {name: part.view_as(scores[name]) for name, part in zip(names, parts, strict=True)}
    return {name: _keep(score.flatten(), sparsity).view_as(score) for name, score in scores.items()}


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    order = scores.argsort(stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[order[: round(sparsity * scores.numel())]] = False
    return keep & (scores > -torch.inf)


def cubic(progress: float, sparsity: float) -> float:
    """Sparsity after the share ``progress`` of a gradual schedule from 0: fast, then slow (Zhu and Gupta 2017)."""
    return sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)
