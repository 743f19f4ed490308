from collections import Counter

import numpy as np
import pytest
from laboratory import GOAL, SMALL, SPARSE, VNNI, ComputedTimes

from whet.progress import Silent
from whet.tune import metaschedule
from whet.tune.records import Records
from whet.tune.search import _winner, tune
from whet.tune.space import space


def job(folder, instances=None, **options):
    records = Records.open(folder, VNNI)
    return tune(instances or {SMALL: 1}, records, Silent(), **options), records


def test_finds_the_best_of_many_in_few_trials(tmp_path):
    found, records = job(tmp_path, trials=48, laboratory=ComputedTimes())
    assert len(list(space(SMALL))) > 150
    assert found[SMALL].settled and found[SMALL].ratio < 0.54  # the goal has 0.5, its nearest neighbours 0.53
    assert len(records.measured(SMALL)) == 48


def test_no_setting_is_measured_twice_and_an_interrupt_loses_nothing(tmp_path):
    first = ComputedTimes(stop_after=21)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, {SMALL: 2, SPARSE: 1}, trials=40, laboratory=first)
    kept = Records.open(tmp_path, VNNI)
    assert [(r.instance, r.knobs) for r in kept.records] == first.ran
    second = ComputedTimes()
    _, records = job(tmp_path, {SMALL: 2, SPARSE: 1}, trials=40, laboratory=second)
    tried = [(r.instance, r.knobs) for r in records.records if not r.settled]
    assert len(tried) == len(set(tried)) == 40
    assert set(first.ran) <= set(tried)
    third = ComputedTimes()
    found, _ = job(tmp_path, {SMALL: 2, SPARSE: 1}, trials=40, laboratory=third)
    assert third.ran == [] and set(found) == {SMALL, SPARSE}


def test_failures_are_kept_and_not_repeated(tmp_path):
    laboratory = ComputedTimes(fails=lambda knobs: knobs.chunk == GOAL["chunk"])
    found, records = job(tmp_path, trials=32, laboratory=laboratory)
    failed = [r for r in records.measured(SMALL).values() if r.error]
    assert failed and {r.knobs.chunk for r in failed} == {GOAL["chunk"]} and failed[0].error == "it was killed"
    assert found[SMALL].knobs.chunk != GOAL["chunk"]


def test_a_job_that_measures_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"not one candidate .* it was killed"):
        job(tmp_path, trials=4, laboratory=ComputedTimes(fails=lambda knobs: True))


def test_time_ends_a_job(tmp_path):
    found, records = job(tmp_path, minutes=0.005, laboratory=ComputedTimes())
    assert SMALL in found and 1 <= len(records.measured(SMALL)) < len(list(space(SMALL)))


@pytest.mark.parametrize("budget", [{}, {"trials": 0}, {"minutes": 0}, {"minutes": -1.0}])
def test_wrong_budgets_are_refused(tmp_path, budget):
    with pytest.raises(ValueError, match="trials"):
        job(tmp_path, laboratory=ComputedTimes(), **budget)


def test_nothing_to_tune_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no kernel"):
        tune({}, Records.open(tmp_path, VNNI), Silent(), trials=3, laboratory=ComputedTimes())


def times(rng, ratios, noise):
    """Seconds of the default and of settings with these ratios per token count: (tokens, rounds, variants)."""
    exact = np.stack([np.ones(len(ratios[0])), *np.array(ratios)], -1)[:, None]
    return exact * rng.normal(1, noise, (exact.shape[0], 25, exact.shape[2]))


def test_noise_elects_no_winner():
    rng = np.random.default_rng(0)
    finalists = [SMALL.default_knobs(), SMALL.knobs(GOAL)]
    elected = sum(_winner(finalists, times(rng, [(1, 1, 1, 1)], 0.1))[0] != finalists[0] for _ in range(200))
    assert elected <= 2


def test_a_faster_setting_wins_unless_it_is_slower_somewhere():
    rng = np.random.default_rng(0)
    finalists = [SMALL.default_knobs(), SMALL.knobs(GOAL), SMALL.knobs({**GOAL, "chunk": 64})]
    assert _winner(finalists[:2], times(rng, [(0.9, 0.9, 0.95, 1.0)], 0.02))[0] == finalists[1]
    assert _winner(finalists[:2], times(rng, [(0.5, 0.5, 0.5, 1.1)], 0.02))[0] == finalists[0]
    both = [(0.9, 0.9, 0.9, 0.9), (0.8, 0.8, 0.8, 0.8)]
    knobs, ratios = _winner(finalists, times(rng, both, 0.02))
    assert knobs == finalists[2] and ratios == pytest.approx((0.8,) * 4, rel=0.02)


def test_kernels_of_other_models_teach_the_cost_model(tmp_path, monkeypatch):
    job(tmp_path, {SPARSE: 1}, trials=12, laboratory=ComputedTimes())
    learned = Counter()
    model = metaschedule.ms.cost_model.XGBModel._cls
    update = model.update

    def count(self, context, candidates, results):
        learned[str(metaschedule.instance_of(context.mod))] += len(candidates)
        update(self, context, candidates, results)

    monkeypatch.setattr(model, "update", count)
    job(tmp_path, trials=4, laboratory=ComputedTimes())
    assert learned[str(SPARSE)] == 12 and learned[str(SMALL)] >= 4
