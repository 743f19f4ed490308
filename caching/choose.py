"""Choose which layers get a cache, and whom each trusts: least expected time within an accuracy budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
Bools: TypeAlias = NDArray[np.bool_]

NEVER = np.inf
"""Threshold of a layer without a cache."""

_CANDIDATES = 40
_SWEEPS = 4
_PRICES = np.geomspace(0.1, 1000.0, 25)


@dataclass(frozen=True)
class Costs:
    """Times, in any unit."""

    layer: float
    cache: float
    """Of asking one cache."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it does to the requests that it was chosen on."""

    thresholds: tuple[float, ...]
    """After each layer but the last; ``NEVER`` where there is no cache."""
    leave: tuple[float, ...]
    """Share of requests that leave after each layer; the last entry is those that run to the end."""
    accuracy: float
    plain_accuracy: float
    cost: float
    """Mean time of a request."""
    plain_cost: float


def choose(confidence: Floats, right: Bools, plain: Bools, costs: Costs, budget: float) -> Choice:
    """Choose thresholds for all layers together.

    For each of many prices of a wrong answer the thresholds are improved one layer at a time until they stay; the
    cheapest outcome within the budget is taken. Within it means: the loss plus its standard error, so that the budget
    also holds for requests that were not seen.

    Args:
        confidence: ``(layers - 1, requests)``, of the cache after each layer but the last.
        right: likewise, whether its answer is right.
        plain: ``(requests,)``, whether the model's own answer is.
        costs: of a layer and of a cache.
        budget: most accuracy to lose, as a share of all requests.

    """
    layers = len(confidence) + 1
    candidates = [np.append(np.quantile(row, np.linspace(0, 1, _CANDIDATES)), NEVER) for row in confidence]
    best = judge(np.full(layers - 1, NEVER), confidence, right, plain, costs)[0]
    for price in _PRICES * layers * costs.layer:
        thresholds = np.full(layers - 1, NEVER)
        for _ in range(_SWEEPS):
            before = thresholds.copy()
            for i in range(layers - 1):
                tried = []
                for candidate in candidates[i]:
                    thresholds[i] = candidate
                    choice, loss = judge(thresholds, confidence, right, plain, costs)
                    tried.append(choice.cost + price * loss)
                    if loss <= budget and choice.cost < best.cost:
                        best = choice
                thresholds[i] = candidates[i][int(np.argmin(tried))]
            if (before == thresholds).all():
                break
    return best


def judge(thresholds: Floats, confidence: Floats, right: Bools, plain: Bools, costs: Costs) -> tuple[Choice, float]:
    """What thresholds do, and the accuracy they lose with its standard error; arguments as of :func:`choose`."""
    layers = len(confidence) + 1
    trusted = np.concatenate([confidence >= thresholds[:, None], np.ones((1, len(plain)), np.bool_)])
    leave = trusted.argmax(axis=0)
    answers = np.concatenate([right, plain[None]])[leave, np.arange(len(plain))]
    lost = plain.astype(np.float64) - answers
    asked = np.append(np.cumsum(thresholds < NEVER), (thresholds < NEVER).sum())
    shares = np.bincount(leave, minlength=layers) / len(plain)
    cost = float(shares @ (np.arange(1, layers + 1) * costs.layer + asked * costs.cache))
    choice = Choice(
        tuple(thresholds.tolist()),
        tuple(shares.tolist()),
        float(answers.mean()),
        float(plain.mean()),
        cost,
        layers * costs.layer,
    )
    return choice, float(lost.mean() + lost.std() / np.sqrt(len(plain)))
