"""Fit learned caches (GATI, arXiv 2101.07344): a small perceptron, distilled from the model's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.caching.adam import Adam, Floats, dense
from whet.caching.cache import to_int8

HIDDEN = 256
"""Units of a cache's hidden layer."""
_BATCH = 256
_RATE = 0.003
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
    parameters = [*dense(rng, HIDDEN, channels), *dense(rng, labels, HIDDEN)]
    first, first_bias, second, second_bias = parameters
    adam = Adam(parameters, steps, _RATE)
    kept = 1 - _DROPOUT
    for _ in range(steps):
        rows = rng.integers(len(x), size=_BATCH)
        z = x[rows] * (rng.random((_BATCH, channels), np.float32) < kept) / np.float32(kept)
        hidden = np.maximum(z @ first.T + first_bias, 0)
        error = (softmax(hidden @ second.T + second_bias) - targets[rows]) / _BATCH
        back = (error @ second) * (hidden > 0)
        adam.step([back.T @ z, back.sum(axis=0), error.T @ hidden, error.sum(axis=0)])
    return perceptron((first, first_bias), (second, second_bias), scale, shift)


def perceptron(
    first: tuple[Floats, Floats], second: tuple[Floats, Floats], scale: Floats, shift: Floats
) -> tuple[NDArray[Any], ...]:
    """The arrays of a cache, of its layers' weights ``(rows, channels)`` and biases ``(rows,)``."""
    return scale, shift, *to_int8(first[0]), first[1], *to_int8(second[0]), second[1]
