"""A laboratory that computes times instead of measuring them, and the kernels that the tests tune."""

from pathlib import Path

import numpy as np
import pytest
from tvm.s_tir import meta_schedule as ms

from whet.schedules.dense import DenseSpec
from whet.schedules.isa import ISAS
from whet.tune.instance import Instance

for package in ("cloudpickle", "psutil", "xgboost"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[tune]'")

VNNI = ISAS["avx512_vnni"]
SMALL = Instance.of(DenseSpec(256, 32, "i8"), VNNI)
SPARSE = Instance.of(DenseSpec(64, 64, "i8_sparse", residual=True), VNNI, 0.21)
GOAL = {"rows": 4, "tiles": 5, "chains": 8, "chunk": 32}
"""The fastest setting, as the laboratory has it."""


def ratio(knobs):
    """Time over the default's: 0.5 at the goal, more with every step away from it."""
    steps = sum(abs(np.log2(getattr(knobs, name) / best)) for name, best in GOAL.items())
    return 0.5 + 0.1 * steps


class Done:
    def __init__(self, outcome):
        self.outcome = outcome

    def done(self):
        return True

    def result(self):
        return self.outcome


class ComputedTimes:
    """Stands for ``whet.tune.laboratory.Laboratory``; ``ran`` are the settings that it was asked to time."""

    def __init__(self, fails=lambda knobs: False, stop_after=None):
        self.fails, self.stop_after = fails, stop_after
        self.ran = []

    def build(self, experiments):
        return [ms.builder.BuilderResult(f"/nowhere/{id(e)}/module", None) for e in experiments]

    def start(self, experiment, path):
        return Done(self._run(experiment, path))

    def _run(self, experiment, path):
        assert Path(path).parent.name == str(id(experiment))
        if self.stop_after is not None and len(self.ran) >= self.stop_after:
            raise KeyboardInterrupt
        self.ran += [(experiment.instance, knobs) for knobs in experiment.variants[1:]]
        if any(self.fails(knobs) for knobs in experiment.variants[1:]):
            return None, "it was killed"
        default = experiment.variants[0]
        times = [1e-6 * (1 if knobs == default else ratio(knobs)) for knobs in experiment.variants]
        return np.broadcast_to(times, (len(experiment.instance.tokens), experiment.rounds, len(times))), ""
