"""What a request's class probably is, once the model and all caches have been asked: what losses are estimated by.

Whether a label proves a cache wrong is a toss for a request that nobody is sure about, and the mean of tosses needs
many requests. Probabilities that are true on average give the same mean with about half the standard error: the labels
are summed out (Rao-Blackwell).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whet.caching.learn import softmax

Floats: TypeAlias = NDArray[np.floating[Any]]

_STEPS = 20
_ENOUGH = 1e-6
"""Fall of the mean cross-entropy below which a step is the last."""


def fit_posterior(logits: Sequence[Floats], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities ``(requests, classes)`` by a weighted sum of several logits, calibrated on ``labels``."""
    return softmax(np.tensordot(fit_weights(logits, labels), np.stack(logits), 1))


def fit_weights(logits: Sequence[Floats], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The weights of that sum, one for each of ``logits``, float ``(requests, classes)``.

    Of a single one it is the inverse of the temperature (Guo et al. 2017, arXiv 1706.04599). By Newton's method on the
    cross-entropy, which is convex in the weights. Half a pseudo-observation's squared distance from the plain mean
    keeps weights finite where all labels are told.
    """
    experts = np.stack([np.asarray(one, np.float64) for one in logits])
    right = experts[:, np.arange(len(labels)), labels]
    start = np.full(len(experts), 1 / len(experts))

    def entropy(weights: Floats) -> float:
        mixed = np.tensordot(weights, experts, 1)
        largest = mixed.max(axis=1)
        total = np.log(np.exp(mixed - largest[:, None]).sum(axis=1)) + largest - weights @ right
        return float(total.mean() + np.square(weights - start).sum() / 2 / len(labels))

    weights, now = start, entropy(start)
    for _ in range(_STEPS):
        p = softmax(np.tensordot(weights, experts, 1))
        mean = (experts * p).sum(axis=2)
        gradient = (mean - right).mean(axis=1) + (weights - start) / len(labels)
        centred = experts - mean[..., None]
        hessian = np.einsum("irc,jrc,rc->ij", centred, centred, p) / len(labels) + np.eye(len(experts)) / len(labels)
        step = np.linalg.solve(hessian, gradient)
        while (new := entropy(weights - step)) > now + _ENOUGH:
            step = step / 2
        weights, before, now = weights - step, now, new
        if before - now < _ENOUGH:
            break
    return weights
