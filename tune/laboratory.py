"""Where experiments are built and timed: by MetaSchedule's builder and runner, whatever those are."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # noqa: F401 -- MetaSchedule needs the three, but would say so late or never
import numpy as np
import psutil  # noqa: F401
import tvm
import xgboost  # noqa: F401
from tvm.s_tir import meta_schedule as ms

from whet.schedules.isa import isa
from whet.tune import metaschedule
from whet.tune.measure import OTHER_GENERATORS, Experiment, allocate_nothing, build, evaluate, start_worker, unpack

TIMEOUT_SECONDS = 120.0
CANDIDATE = "the candidate failed"
"""Stands in a remote runner's message if it was not the worker that failed."""

Outcome = tuple["np.ndarray[Any, Any] | None", str]
"""Seconds ``(tokens, rounds, variants)``, or None and why there are none."""


class WorkersLostError(RuntimeError):
    """No worker could build or time an experiment, which is not the experiment's fault."""


def check(error: str) -> str:
    """Return an error of an experiment as it is. WorkersLostError if that is none of the experiment's."""
    if OTHER_GENERATORS in error:
        raise WorkersLostError(f"{OTHER_GENERATORS} Make them the same, and start the same job again")
    return error


@dataclass
class Laboratory:
    """Builds and times experiments in processes that may die.

    A runner of one machine gives finished results; one of several starts all it is given, at once.
    """

    builder: ms.builder.PyBuilder
    runner: ms.runner.PyRunner
    attempts: int = 1
    """How many workers may fail at an experiment. With one, the failure counts as the experiment's own."""

    @staticmethod
    def local() -> Laboratory:
        """Use this machine, one process for each of the two."""
        runner = ms.runner.LocalRunner(
            timeout_sec=TIMEOUT_SECONDS,
            f_alloc_argument=allocate_nothing,
            f_run_evaluator=evaluate,
            initializer=start_worker,
        )
        return Laboratory(local_builder(), runner)

    def build(self, experiments: list[Experiment]) -> list[ms.builder.BuilderResult]:
        """Build each experiment."""
        inputs = []
        for experiment in experiments:
            module = metaschedule.workload(experiment.instance)
            labelled = tvm.IRModule({"main": module["main"].with_attr("whet.experiment", experiment.to_json())})
            target = tvm.target.Target(isa(experiment.instance.isa).target)
            inputs.append(ms.builder.BuilderInput(labelled, target))
        return list(self.builder.build(inputs))

    def start(self, experiment: Experiment, path: str) -> Timing:
        """Start to time what was built."""
        return Timing(self, experiment, path)


class Timing:
    """An experiment that is being timed."""

    def __init__(self, laboratory: Laboratory, experiment: Experiment, path: str) -> None:
        self.laboratory, self.experiment, self.path = laboratory, experiment, path
        self.future = self._run()

    def _run(self) -> Any:
        (future,) = self.laboratory.runner.run([ms.runner.RunnerInput(self.path, "cpu", [])])
        return future

    def done(self) -> bool:
        """Whether ``result`` needs not wait, unless a worker failed."""
        return bool(self.future.done())

    def result(self) -> Outcome:
        """Wait for the times; what a failed worker was to do is given to another.

        Raises:
            WorkersLostError: workers failed, as many as may.

        """
        for attempt in range(self.laboratory.attempts):
            if attempt:
                self.future = self._run()
            result = self.future.result()
            error = check(str(result.error_msg or ""))
            if result.run_secs is not None or CANDIDATE in error or self.laboratory.attempts == 1:
                with suppress(OSError):
                    shutil.rmtree(Path(self.path).parent)
                if result.run_secs is None:
                    return None, error
                return unpack([float(s) for s in result.run_secs], self.experiment), ""
        raise WorkersLostError(
            f"{self.laboratory.attempts} workers failed in turn, the last said: {' '.join(error.split())[-300:]}. What "
            "was measured is kept: see to the workers, and start the same job again"
        )


def local_builder(processes: int | None = 1) -> ms.builder.PyBuilder:
    """Build on this machine, for whatever target; None: in as many processes as it has cores."""
    return ms.builder.LocalBuilder(
        max_workers=processes, timeout_sec=TIMEOUT_SECONDS, f_build=build, initializer=start_worker
    )
