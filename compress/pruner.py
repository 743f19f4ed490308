"""Decides during training which blocks are kept, and holds the others at zero.

Methods, each ranking blocks of R × 4 weights:

* ``reconstruct``: second-order and without gradients (:mod:`.post_training`);
* ``magnitude``: pooled |w| (Zhu and Gupta 2017; the blocks of Fast DistilBERT on CPUs, Shen et al. 2022);
* ``movement``: pooled sum of −w·∂L/∂w over the steps so far: what moves away from zero stays (Sanh et al. 2020);
* ``snip_momentum``: pooled |w·∂L/∂w|, averaged with decay (SNIP, Lee et al. 2019, as Intel Neural Compressor has it);
* ``lock``: the blocks that are zero stay so, for fine-tuning a sparse model (Prune Once for All, Zafrir et al. 2021).

A block that is gone stays gone. Sparsity grows by the cubic schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import Block
from .features import Batch
from .masks import cubic, keep_best
from .models import Encoder
from .post_training import Advance, prune_post_training
from .recipe import Pruning

MOMENTUM = 0.9
"""Of ``snip_momentum``'s average."""


class Pruner:
    """The masks of a student, and what they are chosen by."""

    def __init__(
        self, student: Encoder, reference: Encoder, recipe: Pruning, steps: int, calibration: Sequence[Batch]
    ) -> None:
        self.student, self.reference = student, reference
        self.recipe = recipe
        self.steps = steps
        self.calibration = calibration
        self.block = Block.parse(recipe.block)
        self.dense: dict[str, nn.Linear] = {
            name: layer for name, layer in student.dense.items() if self.block.divides(layer.weight)
        }
        self.keep = {name: self.block.held(layer.weight) for name, layer in self.dense.items()}
        gradients = recipe.method in ("movement", "snip_momentum")
        self.scores = {name: torch.zeros_like(layer.weight) for name, layer in self.dense.items()} if gradients else {}
        self.errors: dict[str, float] = {}
        self._expand()

    @property
    def sparsity(self) -> float:
        """Share of the blocks that are zero, over all layers that can be pruned."""
        kept, blocks = (sum(int(f(k)) for k in self.keep.values()) for f in (torch.sum, torch.numel))
        return 1 - kept / max(1, blocks)

    def due(self, step: int) -> float | None:
        """The sparsity to prune to before this step, if it is time."""
        p = self.recipe
        if p.method == "lock" or p.sparsity == 0:
            return None
        if not self.steps:
            return p.sparsity
        # First-order scores need steps before the first choice; the others can begin at once.
        first = 1 if self.scores else 0
        places = {round((i - 1 + first) / p.updates * p.end * (self.steps - 1)): i for i in range(1, p.updates + 1)}
        return cubic(places[step] / p.updates, p.sparsity) if step in places else None

    def prune(self, sparsity: float, advance: Advance = lambda done: None) -> None:
        """Choose blocks anew, so that the share ``sparsity`` of them is zero."""
        with torch.no_grad():
            grown = sparsity / self.recipe.sparsity
            shares = {name: grown * self.recipe.shares.get(name, self.recipe.sparsity) for name in self.dense}
            if self.recipe.method == "reconstruct":
                self.errors = prune_post_training(
                    self.student, self.reference, self.calibration, self.block, shares, self.recipe.damping, advance
                )
                self.keep = {name: self.block.held(layer.weight) for name, layer in self.dense.items()}
            else:
                scores = {}
                for name, layer in self.dense.items():
                    by_weight = self.scores[name] if self.scores else layer.weight.abs()
                    pooled = self.block.pool(by_weight, self.recipe.pooling)
                    scores[name] = pooled.masked_fill(~self.keep[name], -torch.inf)
                if self.recipe.budget == "global":
                    self.keep = keep_best(scores, sparsity, everywhere=True)
                else:
                    self.keep = {name: keep_best({name: scores[name]}, shares[name])[name] for name in scores}
            self._expand()
            for name, layer in self.dense.items():
                layer.weight.mul_(self.masks[name])

    def after_backward(self) -> None:
        """Note scores, and keep zero blocks at zero: their weights get no gradient."""
        with torch.no_grad():
            for name, layer in self.dense.items():
                gradient = layer.weight.grad
                if gradient is None:
                    continue
                if self.recipe.method == "movement":
                    self.scores[name] -= layer.weight * gradient
                elif self.recipe.method == "snip_momentum":
                    self.scores[name].lerp_((layer.weight * gradient).abs(), 1 - MOMENTUM)
                gradient.mul_(self.masks[name])

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear the optimizer's momentum of weights that are gone, or it would move them."""
        for name, layer in self.dense.items():
            for value in optimizer.state.get(layer.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.mul_(self.masks[name])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the weights."""
        return {f"keep.{n}": k.to(torch.uint8) for n, k in self.keep.items()} | {
            f"score.{n}": s for n, s in self.scores.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from ``state``."""
        self.keep = {n: state[f"keep.{n}"].bool() for n in self.keep}
        self.scores = {n: state[f"score.{n}"].clone() for n in self.scores}
        self._expand()

    def _expand(self) -> None:
        self.masks = {name: self.block.expand(keep) for name, keep in self.keep.items()}
