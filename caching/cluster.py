"""Fit nearest-neighbour caches (Freeze Inference, arXiv 2002.02645): k-means centroids of earlier requests."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whet.caching.cache import to_int8
from whet.caching.learn import standardise

Floats: TypeAlias = NDArray[np.float32]

CLUSTERS = 512
"""Centroids of a cache, about: each takes a byte per channel, and as many multiplications."""
_MOST_OF_A_LABEL = 32
_ITERATIONS = 15


def fit_clusters(features: Floats, logs: Floats, groups: NDArray[np.int64], seed: int = 0) -> tuple[NDArray[Any], ...]:
    """Cluster requests, each group by itself, so that a cluster stands for one answer.

    Its reach, where the trust in it is 0, is the median distance of its members, but never farther than the nearest
    request of another group, which the cluster would answer wrongly.

    Args:
        features: float32 ``(requests, channels)``.
        logs: float32 ``(requests, labels)``, logarithms of the probabilities that the model gives: a cluster answers
            with the mean of its members'.
        groups: ``(requests,)``, the class that the model gives.
        seed: of where centroids start.

    Returns:
        The arrays of a cache of the kind clusters.

    """
    scale, shift = standardise(features)
    z = features * scale + shift
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    of_a_group = min(_MOST_OF_A_LABEL, max(1, CLUSTERS // len(names)))
    centroids, owners = [], []
    for name in names:
        found = kmeans(z[groups == name], of_a_group, rng)
        centroids.append(found)
        owners += [name] * len(found)
    rows, row_scale = to_int8(np.concatenate(centroids))
    rounded = rows * row_scale[:, None]
    row_bias = -0.5 * np.square(rounded).sum(axis=1)
    scores = z @ rounded.T + row_bias
    nearest = scores.argmax(axis=1)
    squares = np.maximum(np.square(z).sum(axis=1) - 2 * scores.max(axis=1), 0)
    wrong = np.asarray(owners)[nearest] != groups
    answers = np.zeros((len(rows), logs.shape[1]), np.float32)
    inverse_reach = np.full(len(rows), np.float32(1e30))  # a cluster without members is never trusted
    for cluster in range(len(rows)):
        own = (nearest == cluster) & ~wrong
        if own.any():
            reach = np.median(squares[own])
            others = squares[(nearest == cluster) & wrong]
            inverse_reach[cluster] = 1 / max(min(reach, others.min(initial=np.inf)), 1e-6)
            answers[cluster] = logs[own].mean(axis=0)
    values, answer_scale = to_int8(answers)
    return scale, shift, rows, row_scale, row_bias, values, answer_scale, inverse_reach


def kmeans(points: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Centroids of Lloyd's algorithm, started by k-means++ (Arthur and Vassilvitskii 2007): at most ``count``."""
    centroids = points[rng.integers(len(points), size=1)]
    squares = np.square(points - centroids[0]).sum(axis=1)
    while len(centroids) < min(count, len(points)) and squares.sum() > 0:
        chosen = rng.choice(len(points), p=squares / squares.sum())
        centroids = np.concatenate([centroids, points[chosen : chosen + 1]])
        squares = np.minimum(squares, np.square(points - points[chosen]).sum(axis=1))
    for _ in range(_ITERATIONS):
        nearest = (points @ centroids.T - 0.5 * np.square(centroids).sum(axis=1)).argmax(axis=1)
        used = np.unique(nearest)
        centroids = np.stack([points[nearest == i].mean(axis=0) for i in used])
    return centroids
