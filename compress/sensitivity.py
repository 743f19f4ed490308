"""How much a model loses when one of its layers is pruned, for every sparsity: what a budget of time is spent by.

The loss of a layer's own output at each sparsity comes from its reconstruction (:mod:`.reconstruct`). What such a loss
means for the model is measured: with one layer pruned and all others dense, how far do the last layer's states move?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .blocks import Block
from .features import Batch
from .losses import run
from .models import Encoder
from .post_training import Advance, first_call, moments_of, targets_of
from .reconstruct import reconstruct

DEEPEST = 0.95
HELD_OUT = 8
"""One batch in so many is not reconstructed from: a layer's effect is measured there, where it is not flattered."""
Curve = Mapping[float, float]
"""Squared error of the model's states, in variances, by the layer's sparsity."""


def measure_sensitivity(
    encoder: Encoder,
    batches: Sequence[Batch],
    block: Block,
    grid: Sequence[float],
    probed: float,
    damping: float,
    advance: Advance = lambda done: None,
) -> dict[str, Curve]:
    """Curves of every dense layer that whole blocks cover, at the sparsities of ``grid`` up to ``DEEPEST``.

    ``batches`` are calibration texts. A layer's effect on the model is measured at the sparsity ``probed``. The encoder
    is left as it was. Raises ValueError for a single batch: some are held out.
    """
    if len(batches) < 2:
        raise ValueError("a budget of time needs more calibration texts than one batch of 64; give more")
    with torch.no_grad():
        probes = batches[::HELD_OUT]
        batches = [batch for i, batch in enumerate(batches) if i % HELD_OUT]
        masks = [batch["attention_mask"].bool() for batch in batches]
        calls = [first_call(encoder, batch) for batch in batches]
        wanted = _states(encoder, probes)
        curves: dict[str, Curve] = {}
        for i, layer in enumerate(encoder.layers):
            targets, following = targets_of(layer, encoder.family, calls, masks)
            for group in encoder.family.groups:
                moments = moments_of(layer, group, encoder.family, calls, targets, masks)
                for name in group:
                    dense = layer.get_submodule(name)
                    if block.divides(dense.weight):
                        made = reconstruct(dense.weight, moments[name], block, probed, damping, DEEPEST)
                        kept = dense.weight.clone(), dense.bias.clone()
                        dense.weight.copy_(made.weight)
                        dense.bias.copy_(made.bias)
                        moved = _distance(_states(encoder, probes), wanted)
                        dense.weight.copy_(kept[0])
                        dense.bias.copy_(kept[1])
                        scale = moved / max(float(made.curve[round(probed * made.keep.numel())]), 1e-12)
                        places = {s: min(round(s * made.keep.numel()), len(made.curve) - 1) for s in grid}
                        curves[f"{i}.{name}"] = {s: scale * float(made.curve[n]) for s, n in places.items()}
                    advance(len(curves))
            calls = following
        return curves


def _states(encoder: Encoder, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([run(encoder, batch).states[-1][batch["attention_mask"].bool()] for batch in batches])


def _distance(own: Tensor, other: Tensor) -> float:
    return float((own - other).square().mean() / (other - other.mean(0)).square().mean())


def allocate(loss: Mapping[str, Curve], time: Mapping[str, Curve], limit: float) -> dict[str, float]:
    """Choose a sparsity per layer: the least sum of losses whose sum of times is at most ``limit``.

    Both give values at the same sparsities for each layer. By Lagrange: every layer minimises loss + price × time, and
    the price is the lowest that meets the limit (Everett 1963; as optimal pruning allocates bits and sparsity). Raises
    ValueError where even the highest sparsities take longer.
    """
    least = sum(min(curve.values()) for curve in time.values())
    if least > limit:
        raise ValueError(f"the limit is {limit:.4g}; even the fastest layers take {least:.4g}: allow more")

    def choose(price: float) -> dict[str, float]:
        return {n: min(loss[n], key=lambda s, n=n: (loss[n][s] + price * time[n][s], s)) for n in loss}  # type: ignore[misc]

    def total(chosen: Mapping[str, float]) -> float:
        return sum(time[n][s] for n, s in chosen.items())

    low, high = 0.0, 1.0
    if total(choose(low)) <= limit:
        return choose(low)
    while total(choose(high)) > limit:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if total(choose(middle)) <= limit else (middle, high)
    return choose(high)
