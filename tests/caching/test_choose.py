"""Layers and thresholds: never over the budget, no cache where it does not pay, and close to the best there is."""

import itertools

import numpy as np
import pytest

from whet.caching.choose import NEVER, Costs, choose, judge

COSTS = Costs(100.0, 5.0)


def world(layers=4, requests=2000, seed=0):
    """Confidence and rightness of caches that get better from layer to layer; the sure ones are right more often."""
    rng = np.random.default_rng(seed)
    ease = rng.random(requests)
    confidence = np.clip(ease + np.linspace(-0.2, 0.2, layers - 1)[:, None], 0, 1) * 0.9 + 0.1 * rng.random(
        (layers - 1, requests)
    )
    right = rng.random((layers - 1, requests)) < 0.4 + 0.6 * confidence
    return confidence, right, rng.random(requests) < 0.95


@pytest.mark.parametrize("budget", [0.0, 0.005, 0.05, 0.3])
def test_budget(budget):
    confidence, right, plain = world()
    choice = choose(confidence, right, plain, COSTS, budget)
    assert choice.plain_accuracy - choice.accuracy <= budget
    assert sum(choice.leave) == pytest.approx(1)
    assert choice.cost <= choice.plain_cost
    if budget >= 0.05:
        assert choice.cost < 0.95 * choice.plain_cost


def test_more_budget_is_never_slower():
    costs = [choose(*world(), COSTS, budget).cost for budget in (0.01, 0.05, 0.2, 1.0)]
    assert costs == sorted(costs, reverse=True)


def test_no_cache_where_it_does_not_pay():
    choice = choose(*world(), Costs(100.0, 1000.0), 0.05)
    assert choice.thresholds == (NEVER,) * 3 and choice.leave == (0, 0, 0, 1)
    assert choice.cost == choice.plain_cost


def test_useless_caches_are_not_used():
    confidence, right, plain = world()
    choice = choose(confidence, np.zeros_like(right), np.ones_like(plain), COSTS, 0.001)
    assert choice.leave == (0, 0, 0, 1)


def test_close_to_the_best_of_all_combinations():
    confidence, right, plain = world(layers=3, requests=500)
    choice = choose(confidence, right, plain, COSTS, 0.1)
    grid = [np.append(np.quantile(row, np.linspace(0, 1, 30)), NEVER) for row in confidence]
    tried = (judge(np.array(t), confidence, right, plain, COSTS) for t in itertools.product(*grid))
    assert choice.cost <= 1.05 * min(found.cost for found, loss in tried if loss <= 0.1)
