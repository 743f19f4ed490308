"""Fit learned caches (GATI, arXiv 2101.07344): a linear predictor, distilled from the model's own answers."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whet.caching.cache import to_int8

Floats: TypeAlias = NDArray[np.float32]

_BATCH = 256
_RATE = 0.01
_DECAY = 1e-4
"""Of the weights, per step, in units of the rate."""


def softmax(logits: Floats) -> Floats:
    """Probabilities of each row."""
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = exps / exps.sum(axis=1, keepdims=True)
    return probabilities


def standardise(features: Floats) -> tuple[Floats, Floats]:
    """Scale and shift ``(channels,)`` that give features ``(requests, channels)`` mean 0 and deviation 1."""
    scale = (1 / (features.std(axis=0) + 1e-6)).astype(np.float32)
    return scale, (-features.mean(axis=0) * scale).astype(np.float32)


def linear(weight: Floats, bias: Floats, scale: Floats, shift: Floats) -> tuple[NDArray[Any], ...]:
    """The arrays of a linear cache: ``weight`` ``(rows, channels)`` is for features that are scaled and shifted."""
    rows, row_scale = to_int8(weight)
    return scale, shift, rows, row_scale, bias


def fit_classifier(features: Floats, targets: Floats, steps: int = 2000, seed: int = 0) -> tuple[NDArray[Any], ...]:
    """Fit ``softmax(weight · z + bias)`` to probabilities, by Adam (Kingma and Ba 2015) on the cross-entropy.

    Args:
        features: float32 ``(requests, channels)``.
        targets: float32 ``(requests, labels)``; rows sum to 1.
        steps: of the optimiser; every request is seen equally often.
        seed: of the order of requests.

    Returns:
        The arrays of a cache of the kind classifier.

    """
    scale, shift = standardise(features)
    x: Floats = (features * scale + shift).astype(np.float32)
    rng = np.random.default_rng(seed)
    parameters: list[Floats] = [
        np.zeros((targets.shape[1], x.shape[1]), np.float32),
        np.zeros(targets.shape[1], np.float32),
    ]
    moments: list[list[Any]] = [[np.zeros_like(p), np.zeros_like(p)] for p in parameters]
    batches = -(-len(x) // _BATCH)
    epochs = -(-steps // batches)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), _BATCH):
            rows = order[start : start + _BATCH]
            step += 1
            weight, bias = parameters
            error = (softmax(x[rows] @ weight.T + bias) - targets[rows]) / len(rows)
            gradients = [error.T @ x[rows] + _DECAY * weight, error.sum(axis=0)]
            rate = _RATE * (1 - (step - 1) / (epochs * batches))
            for parameter, moment, gradient in zip(parameters, moments, gradients, strict=True):
                moment[0] = 0.9 * moment[0] + 0.1 * gradient
                moment[1] = 0.999 * moment[1] + 0.001 * gradient * gradient
                unbiased = moment[1] / (1 - 0.999**step)
                parameter -= rate / (1 - 0.9**step) * moment[0] / (np.sqrt(unbiased) + 1e-8)
    weight, bias = parameters
    return linear(weight, bias, scale, shift)
