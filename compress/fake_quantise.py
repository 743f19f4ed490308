"""Quantisation-aware training: dense layers compute with the rounding that the compiler will do.

Numbers are rounded as ``whet.passes.quantise`` rounds them and go on as floats; gradients pass as if they had not been
(the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; quantisation-aware training as by Jacob et al.
2018, arXiv 1712.05877). Weights have a scale per row, inputs that come from a layer norm one per token. Where the
compiler calibrates one scale for all tokens, and smooths outlier channels, the tokens of the batch stand for all: that
needs no state, so an interrupted run continues to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .models import Encoder

QUERY_KEY_VALUE, _CONTEXT, UP, DOWN = range(4)
"""The groups of a layer's dense layers, as ``Family`` has them."""
REACH = 2.0
"""Channels may reach so many times as far as the median channel, as in ``whet.passes.smooth_outliers``."""


@contextmanager
def fake_quantised(encoder: Encoder) -> Iterator[None]:
    """Let the dense layers of the encoder round as its int8 module will, while the context lasts."""
    changed = []
    for layer in encoder.layers:
        for group, names in enumerate(encoder.family.groups):
            for dense in map(layer.get_submodule, names):
                dense.forward = partial(_forward, dense, group)
                changed.append(dense)
    try:
        yield
    finally:
        for dense in changed:
            del dense.forward


def _forward(dense: nn.Linear, group: int, x: Tensor) -> Tensor:
    """A dense layer of a group: x ``(batch, tokens, K)`` to float32 ``(batch, tokens, N)``."""
    with torch.autocast(x.device.type, enabled=False):
        x, weight = x.float(), dense.weight
        if group == DOWN:
            reach = x.detach().abs().amax(dim=(0, 1))
            excess = (reach / (REACH * reach.median().clamp(min=1e-8))).clamp(min=1)
            x, weight = x / excess, weight * excess
        rounded = round_affine(x, per_token=group in (QUERY_KEY_VALUE, UP))
        y = nn.functional.linear(rounded, round_symmetric(weight, dim=1), dense.bias)
        return round_symmetric(y) if group == QUERY_KEY_VALUE else y


def round_affine(x: Tensor, per_token: bool) -> Tensor:
    """What uint8 leaves of x ``(…, channels)``: a scale and zero point of each token's own, or one for all."""
    low, high = (x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True))
    if not per_token:
        low, high = low.amin(), high.amax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-8)
    zero = (-low / scale).round()
    return _straight_through(x, (((x.detach() / scale).round() + zero).clamp(0, 255) - zero) * scale)


def round_symmetric(x: Tensor, dim: int | None = None) -> Tensor:
    """What int8 in [-127, 127] leaves of x, with one scale, or one for each row along ``dim``."""
    reach = x.detach().abs()
    reach = reach.amax() if dim is None else reach.amax(dim, keepdim=True)
    scale = (reach / 127).clamp(min=1e-12)
    return _straight_through(x, (x.detach() / scale).round() * scale)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x.detach())
