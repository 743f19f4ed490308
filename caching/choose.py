"""Choose which layers get a cache, and how far each is trusted: least expected time within a budget of loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]

NEVER = float(np.finfo(np.float32).max)
"""Threshold that no trust reaches: of a layer without a cache."""

_SWEEPS = 6
_FOLDS = 4
_PRICES = np.geomspace(0.02, 5000.0, 40)
"""Of one wrong answer, in layers."""
_STEPS = 20
_ERRORS = 2.0
"""Standard errors between a loss and the budget."""
_UNLIKE = 0.1
"""Share of requests, those that it trusts least, that no cache answers: requests unlike all that it was fitted to are
trusted less than most."""


@dataclass(frozen=True)
class Costs:
    """Times, in any unit."""

    fixed: float
    """Of what every request goes through: tokenising, embedding."""
    layer: float
    cache: float
    """Of asking one cache."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it does to the requests that it was chosen on."""

    thresholds: tuple[float, ...]
    """After 0, 1, 2, … layers; ``NEVER`` where there is no cache."""
    leave: tuple[float, ...]
    """Share of requests that leave after 0, 1, 2, … layers; the last entry is those that run to the end."""
    loss: float
    """Mean, of all requests; as it was chosen by, cross-validated."""
    error: float
    """Standard error of that."""
    cost: float
    """Mean time of a request."""
    plain_cost: float


def choose(trust: Floats, loss: Floats, costs: Costs, budget: float) -> Choice:
    """Choose thresholds for all layers together.

    For each of many prices of a loss the thresholds are improved one layer at a time, each to its optimum, until they
    stay. The cheapest outcome within the budget is taken, or what lies between it and the next cheaper one, as far
    towards that as the budget goes. Within it means: the mean loss plus twice its standard error, so that the budget
    also holds for requests that were not seen (with one, a quarter of fresh samples lost more). For the same reason
    the loss is cross-validated: requests are judged by thresholds that were chosen without them, since the best
    threshold of many is partly a lucky one. No cache answers the requests that it trusts least, right as it may be: who
    comes later and resembles none of these is to go on.

    Args:
        trust: ``(layers, requests)``, in the cache after 0, 1, 2, … layers.
        loss: likewise, what is lost if that cache answers in place of the model; below 0 where it is better.
        costs: of a layer and of a cache.
        budget: most loss, as a mean over all requests.

    """
    requests = np.arange(trust.shape[1])
    folds = [requests[k::_FOLDS] for k in range(_FOLDS)]
    seen = [*(np.setdiff1d(requests, fold) for fold in folds), requests]

    def judged(path: Sequence[Floats]) -> Choice:
        """The last of these thresholds, with the loss that those without each fold have on it."""
        lost = np.concatenate(
            [_outcome(t, trust[:, f], loss[:, f], costs)[1] for t, f in zip(path, folds, strict=False)]
        )
        error = float(lost.std() / np.sqrt(len(lost)))
        return replace(judge(path[-1], trust, loss, costs), loss=float(lost.mean()), error=error)

    paths = [[_descend(trust[:, s], loss[:, s], costs, price) for s in seen] for price in _PRICES * costs.layer]
    paths.append([np.full(len(trust), NEVER)] * len(seen))
    choices = [judged(path) for path in paths]
    fits = [i for i, c in enumerate(choices) if c.loss + _ERRORS * c.error <= budget]
    best = min(fits, key=lambda i: choices[i].cost)
    cheaper = [i for i, c in enumerate(choices) if c.cost < choices[best].cost]
    if not cheaper:
        return choices[best]
    next_one = max(cheaper, key=lambda i: choices[i].cost)
    between = [
        judged([_between(a, b, w, trust[:, s]) for a, b, s in zip(paths[best], paths[next_one], seen, strict=True)])
        for w in np.linspace(0, 1, _STEPS + 1)[1:-1]
    ]
    within = [c for c in between if c.loss + _ERRORS * c.error <= budget]
    return min([choices[best], *within], key=lambda c: c.cost)


def _between(a: Floats, b: Floats, weight: float, trust: Floats) -> NDArray[np.float64]:
    """Thresholds between two, by the shares of requests whose trust they exceed."""
    thresholds = np.full(len(a), NEVER)
    for i, row in enumerate(trust):
        level = (1 - weight) * (row < a[i]).mean() + weight * (row < b[i]).mean()
        if level < 1:
            thresholds[i] = np.quantile(row, level)
    return thresholds


def _descend(trust: Floats, loss: Floats, costs: Costs, price: float) -> NDArray[np.float64]:
    """Improve the thresholds one layer at a time."""
    orders = np.argsort(-trust, axis=1, kind="stable")
    floors = np.quantile(trust, _UNLIKE, axis=1)
    thresholds = np.full(len(trust), NEVER)
    for _ in range(_SWEEPS):
        before = thresholds.copy()
        for i in range(len(trust)):
            thresholds[i] = _best_threshold(i, orders[i], floors[i], thresholds, trust, loss, costs, price)
        if (before == thresholds).all():
            break
    return thresholds


def _best_threshold(
    i: int,
    order: NDArray[np.intp],
    floor: float,
    thresholds: NDArray[np.float64],
    trust: Floats,
    loss: Floats,
    costs: Costs,
    price: float,
) -> float:
    """The threshold after layer ``i``, from ``floor`` on, that costs least, the other layers' being as they are."""
    here = order[(trust[:i, order] < thresholds[:i, None]).all(axis=0)]
    later = _outcome(np.where(np.arange(len(trust)) <= i, NEVER, thresholds), trust, loss, costs)
    asked = (thresholds[:i] < NEVER).sum()
    go_on = later[0][here] + asked * costs.cache + price * later[1][here]
    leave = i * costs.layer + asked * costs.cache + price * loss[i, here]
    # Of the requests in descending order of trust, the first so many leave.
    gain = np.cumsum(go_on - leave)
    ends = np.append(trust[i, here][1:] < trust[i, here][:-1], True) if len(here) else np.zeros(0, np.bool_)
    gain = np.where(ends & (trust[i, here] >= floor), gain, -np.inf)
    if not len(here) or gain.max() <= len(here) * costs.cache:
        return NEVER
    return float(trust[i, here[int(gain.argmax())]])


def _outcome(thresholds: Floats, trust: Floats, loss: Floats, costs: Costs) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Time, loss and number of layers of every request; the time without ``costs.fixed``."""
    requests = trust.shape[1]
    leave = np.concatenate([trust >= thresholds[:, None], np.ones((1, requests), np.bool_)]).argmax(axis=0)
    asked = np.append(np.cumsum(thresholds < NEVER), (thresholds < NEVER).sum())
    lost = np.concatenate([loss, np.zeros((1, requests))])[leave, np.arange(requests)]
    return leave * costs.layer + asked[leave] * costs.cache, lost, leave


def judge(thresholds: Floats, trust: Floats, loss: Floats, costs: Costs) -> Choice:
    """What thresholds do; arguments as of :func:`choose`."""
    time, lost, leave = _outcome(thresholds, trust, loss, costs)
    shares = np.bincount(leave, minlength=len(trust) + 1) / len(leave)
    return Choice(
        tuple(thresholds.tolist()),
        tuple(shares.tolist()),
        float(lost.mean()),
        float(lost.std() / np.sqrt(len(lost))),
        costs.fixed + float(time.mean()),
        costs.fixed + len(trust) * costs.layer,
    )
