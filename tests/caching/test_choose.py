"""Layers and thresholds: never over the budget, no cache where it does not pay, and close to the best there is."""

import itertools

import numpy as np
import pytest

from whet.caching.choose import NEVER, Costs, choose, judge

COSTS = Costs(20.0, 100.0, 5.0)


def world(layers=3, requests=1000, seed=0):
    """Trust in caches and what they lose: they get better from layer to layer; the sure ones are right more often."""
    rng = np.random.default_rng(seed)
    ease = rng.random(requests)
    trust = np.clip(ease + np.linspace(-0.2, 0.2, layers)[:, None], 0, 1) * 0.9 + 0.1 * rng.random((layers, requests))
    right = rng.random((layers, requests)) < 0.4 + 0.6 * trust
    return trust, (rng.random(requests) < 0.95).astype(float) - right


@pytest.mark.parametrize("budget", [0.0, 0.005, 0.05, 0.3])
def test_budget(budget):
    choice = choose(*world(), COSTS, budget)
    assert choice.loss + 2 * choice.error <= budget
    assert sum(choice.leave) == pytest.approx(1)
    assert choice.cost <= choice.plain_cost == 320
    if budget >= 0.05:
        assert choice.cost < 0.95 * choice.plain_cost


def test_the_report_is_what_the_thresholds_do():
    trust, loss = world()
    choice = choose(trust, loss, COSTS, 0.05)
    left, costs = [0, 0, 0, 0], 0.0
    for request in range(trust.shape[1]):
        cost = COSTS.fixed
        for layer, threshold in enumerate([*choice.thresholds, None]):
            if threshold is None or trust[layer, request] >= threshold:
                cost += COSTS.cache * (threshold not in (None, NEVER))
                break
            cost += COSTS.layer + COSTS.cache * (threshold < NEVER)
        left[layer] += 1
        costs += cost
    assert choice.leave == pytest.approx(np.array(left) / trust.shape[1])
    assert choice.cost == pytest.approx(costs / trust.shape[1])


def test_the_loss_holds_for_requests_that_were_not_seen():
    for seed in range(3):
        choice = choose(*world(seed=seed), COSTS, 0.03)
        fresh = judge(np.array(choice.thresholds), *world(requests=20000, seed=seed + 10), COSTS)
        assert abs(fresh.loss - choice.loss) < 2.5 * choice.error


def test_more_budget_is_never_slower():
    costs = [choose(*world(), COSTS, budget).cost for budget in (0.01, 0.05, 0.2, 1.0)]
    assert costs == sorted(costs, reverse=True)


def test_no_cache_where_it_does_not_pay():
    choice = choose(*world(), Costs(20.0, 100.0, 1000.0), 0.05)
    assert choice.thresholds == (NEVER,) * 3 and choice.leave == (0, 0, 0, 1)
    assert choice.cost == choice.plain_cost


def test_useless_caches_are_not_used():
    trust, loss = world()
    assert choose(trust, np.ones_like(loss), COSTS, 0.001).leave == (0, 0, 0, 1)


def test_close_to_the_best_of_all_combinations():
    trust, loss = world(requests=2000)
    choice = choose(trust, loss, COSTS, 0.1)
    grid = [np.append(np.quantile(row, np.linspace(0, 1, 14)), NEVER) for row in trust]
    tried = (judge(np.array(t), trust, loss, COSTS) for t in itertools.product(*grid))
    assert choice.cost <= 1.1 * min(found.cost for found in tried if found.loss + 2 * found.error <= 0.1)


def test_requests_unlike_the_others_go_on_however_right_the_caches_are():
    trust, loss = world()
    choice = choose(trust, np.zeros_like(loss), COSTS, 0.0)
    assert (np.array(choice.thresholds) >= np.quantile(trust, 0.05, axis=1)).all()
    assert choice.leave[0] == pytest.approx(0.9)
