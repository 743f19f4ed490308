from dataclasses import asdict

import numpy as np
import pytest
from laboratory import GOAL, SMALL, SPARSE
from tvm import s_tir
from tvm_ffi import structural_equal

from whet.tune.instance import Instance
from whet.tune.metaschedule import (
    FEATURES,
    _ChangeOne,
    features,
    instance_of,
    knob_values,
    replay,
    schedule_of,
    tune_context,
    workload,
)
from whet.tune.records import Record
from whet.tune.space import space


def test_equal_instances_are_one_workload():
    again = Instance.from_json(SMALL.to_json())
    assert structural_equal(workload(SMALL), workload(again))
    assert not structural_equal(workload(SMALL), workload(SPARSE))
    assert instance_of(workload(SPARSE)) == SPARSE


def test_a_schedule_carries_its_knobs():
    assert knob_values(schedule_of(SMALL, SMALL.knobs(GOAL)).mod) == GOAL


def test_a_record_becomes_the_candidate_it_was():
    record = Record(SMALL, SMALL.knobs(GOAL), (0.5, 0.6, 0.7, 0.8))
    candidate, result = replay(record)
    assert knob_values(candidate.sch.mod) == GOAL
    assert [float(s) for s in result.run_secs] == [0.5, 0.6, 0.7, 0.8]


def test_mutation_changes_one_knob():
    trace, of = schedule_of(SMALL, SMALL.default_knobs()).trace, space(SMALL)
    mutator = _ChangeOne(0)
    before = asdict(SMALL.default_knobs())
    changed = set()
    for _ in range(40):
        schedule = s_tir.Schedule(workload(SMALL))
        mutator.apply(trace).apply_to_schedule(schedule, remove_postproc=True)
        after = knob_values(schedule.mod)
        different = [name for name in of.choices if after[name] != before[name]]
        assert len(different) == 1
        changed.update(different)
    assert changed == set(of.choices)


def test_the_design_space_is_sampled_within_bounds():
    context = tune_context(SMALL, seed=3)
    assert len(context.generate_design_space()) == 1


@pytest.mark.parametrize("instance", [SMALL, SPARSE], ids=str)
def test_features_have_one_width_and_see_every_knob(instance):
    base = asdict(instance.default_knobs())
    row = features(instance, base)
    assert row.shape == (1, FEATURES)
    for name in base:
        assert not np.array_equal(features(instance, {**base, name: base[name] + 1}), row)
