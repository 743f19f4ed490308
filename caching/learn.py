"""Fit learned caches (GATI, arXiv 2101.07344): a small perceptron, distilled from the model's own answers."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whet.caching.cache import to_int8

Floats: TypeAlias = NDArray[np.float32]

HIDDEN = 256
"""Units of a cache's hidden layer."""
_BATCH = 256
_RATE = 0.003
_WARM_UP = 0.1
"""Share of the steps in which the rate rises; then it falls."""
_DECAY = 0.01
"""Of the weights, per step, in units of the rate (AdamW, Loshchilov and Hutter 2019)."""
_DROPOUT = 0.3
"""Of the features: without it caches are too sure of what they have seen."""


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Probabilities of each row, of the precision of the logits."""
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[Any] = exps / exps.sum(axis=1, keepdims=True)
    return probabilities


def standardise(features: Floats) -> tuple[Floats, Floats]:
    """Scale and shift ``(channels,)`` that give features ``(requests, channels)`` mean 0 and deviation 1."""
    scale = (1 / (features.std(axis=0) + 1e-6)).astype(np.float32)
    return scale, (-features.mean(axis=0) * scale).astype(np.float32)


def fit_perceptron(features: Floats, targets: Floats, steps: int = 2000, seed: int = 0) -> tuple[NDArray[Any], ...]:
    """Fit ``softmax(W2 · max(W1 · z + b1, 0) + b2)`` to probabilities: Adam on the cross-entropy, with dropout.

    Args:
        features: float32 ``(requests, channels)``; z is these, standardised.
        targets: float32 ``(requests, labels)``; rows sum to 1.
        steps: of the optimiser, 256 requests each.
        seed: of the first weights, the requests of a step and the dropout.

    Returns:
        The arrays of a cache of the kind perceptron.

    """
    scale, shift = standardise(features)
    x: Floats = (features * scale + shift).astype(np.float32)
    rng = np.random.default_rng(seed)
    labels, channels = targets.shape[1], x.shape[1]
    parameters: list[Floats] = [*_dense(rng, HIDDEN, channels), *_dense(rng, labels, HIDDEN)]
    moments: list[list[Any]] = [[np.zeros_like(p), np.zeros_like(p)] for p in parameters]
    kept = 1 - _DROPOUT
    for step in range(1, steps + 1):
        first, first_bias, second, second_bias = parameters
        rows = rng.integers(len(x), size=_BATCH)
        z = x[rows] * (rng.random((_BATCH, channels), np.float32) < kept) / np.float32(kept)
        hidden = np.maximum(z @ first.T + first_bias, 0)
        error = (softmax(hidden @ second.T + second_bias) - targets[rows]) / _BATCH
        back = (error @ second) * (hidden > 0)
        gradients = [back.T @ z, back.sum(axis=0), error.T @ hidden, error.sum(axis=0)]
        rate = _RATE * min(step / (_WARM_UP * steps), (1 - step / steps) / (1 - _WARM_UP))
        for parameter, moment, gradient in zip(parameters, moments, gradients, strict=True):
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.999 * moment[1] + 0.001 * gradient * gradient
            unbiased = moment[1] / (1 - 0.999**step)
            parameter *= 1 - rate * _DECAY
            parameter -= rate / (1 - 0.9**step) * moment[0] / (np.sqrt(unbiased) + 1e-8)
    return perceptron((parameters[0], parameters[1]), (parameters[2], parameters[3]), scale, shift)


def perceptron(
    first: tuple[Floats, Floats], second: tuple[Floats, Floats], scale: Floats, shift: Floats
) -> tuple[NDArray[Any], ...]:
    """The arrays of a cache, of its layers' weights ``(rows, channels)`` and biases ``(rows,)``."""
    return scale, shift, *to_int8(first[0]), first[1], *to_int8(second[0]), second[1]


def _dense(rng: np.random.Generator, rows: int, channels: int) -> tuple[Floats, Floats]:
    """Weights ``(rows, channels)`` to start from, and biases of 0."""
    weight = rng.uniform(-1, 1, (rows, channels)) / np.sqrt(channels)
    return weight.astype(np.float32), np.zeros(rows, np.float32)
