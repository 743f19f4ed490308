"""The tuning job: MetaSchedule's scheduler, evolutionary search and cost model over the kernels of a model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle  # noqa: F401 -- MetaSchedule needs the three, but would say so late or never
import numpy as np
import psutil  # noqa: F401
import tvm
import xgboost  # noqa: F401
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from whet.progress import Progress
from whet.schedules.isa import isa
from whet.tune import metaschedule
from whet.tune.instance import Instance, Knobs
from whet.tune.measure import Experiment, allocate_nothing, build, evaluate, start_worker, unpack
from whet.tune.records import Record, Records

ROUNDS = 7
"""Turns of a candidate and the default in one trial."""
BATCH = 8
"""Trials of a kernel between two updates of the cost model."""
TOGETHER = 4
"""Candidates that are built, and timed in turns, with one default."""
SETTLE_ROUNDS = 25
FINALISTS = 3
SLOWER = 1.02
"""A setting that wins on the whole may not be slower than this, times the default, at any token count."""
FASTER = 0.99
"""A setting must be at most this, times the default, to take its place: less is noise."""
OFTEN = 0.8
"""The share of the rounds in which it must be faster."""
SETTLE_SECONDS = 8.0
"""What settling one kernel takes, about: kept back from a budget of time."""
TIMEOUT_SECONDS = 120.0
WARM_UP = 24
"""Trials before the cost model is asked."""


@dataclass
class Laboratory:
    """Builds and times experiments in MetaSchedule's worker processes; both survive a worker's death."""

    builder: ms.builder.PyBuilder
    runner: ms.runner.PyRunner

    @staticmethod
    def local() -> Laboratory:
        """Use this machine, one process for each of the two."""
        return Laboratory(
            ms.builder.LocalBuilder(
                max_workers=1, timeout_sec=TIMEOUT_SECONDS, f_build=build, initializer=start_worker
            ),
            ms.runner.LocalRunner(
                timeout_sec=TIMEOUT_SECONDS,
                f_alloc_argument=allocate_nothing,
                f_run_evaluator=evaluate,
                initializer=start_worker,
            ),
        )

    def build(self, experiments: list[Experiment]) -> list[ms.builder.BuilderResult]:
        """Build each experiment."""
        inputs = []
        for experiment in experiments:
            module = metaschedule.workload(experiment.instance)
            labelled = tvm.IRModule({"main": module["main"].with_attr("whet.experiment", experiment.to_json())})
            target = tvm.target.Target(isa(experiment.instance.isa).target)
            inputs.append(ms.builder.BuilderInput(labelled, target))
        return list(self.builder.build(inputs))

    def run(self, experiment: Experiment, path: str) -> tuple[np.ndarray[Any, Any] | None, str]:
        """Time what was built; returns seconds ``(tokens, rounds, variants)``, or None and why there are none."""
        (future,) = self.runner.run([ms.runner.RunnerInput(path, "cpu", [])])
        result = future.result()
        with suppress(OSError):
            shutil.rmtree(Path(path).parent)
        if result.run_secs is None:
            return None, str(result.error_msg)
        return unpack([float(s) for s in result.run_secs], experiment), ""


class _BudgetSpent(Exception):
    """No trials or no time are left."""


@dataclass
class _Job:
    """Does what MetaSchedule wants measured, unless records already hold it, and keeps what comes out."""

    laboratory: Laboratory
    records: Records
    trials: int | None
    """How many settings may still be measured."""
    deadline: float | None
    advance: Callable[[int], None]
    done: int = 0
    stopped: BaseException | None = None
    """What ended the search; TVM passes an exception on, but not its type."""
    asked: dict[str, tuple[Instance, Knobs]] = field(default_factory=dict)
    """Candidates by the path that stands for them in MetaSchedule's eyes."""
    built: dict[tuple[Instance, Knobs], tuple[Experiment, ms.builder.BuilderResult]] = field(default_factory=dict)

    def build(self, inputs: list[ms.builder.BuilderInput]) -> list[ms.builder.BuilderResult]:
        try:
            return [ms.builder.BuilderResult(path, None) for path in self.prepare([each.mod for each in inputs])]
        except BaseException as stopped:
            self.stopped = stopped
            raise

    def run(self, inputs: list[ms.runner.RunnerInput]) -> list[Any]:
        try:
            return [_Done(self.result(str(each.artifact_path))) for each in inputs]
        except BaseException as stopped:
            self.stopped = stopped
            raise

    def prepare(self, modules: list[tvm.IRModule]) -> list[str]:
        """Build what no record answers for, several candidates with one default; returns the path of each."""
        asked = []
        for module in modules:
            instance = metaschedule.instance_of(module)
            asked.append((instance, instance.knobs(metaschedule.knob_values(module))))
        fresh: dict[Instance, list[Knobs]] = {}
        left = len(asked) if self.trials is None else self.trials - self.done
        for instance, knobs in [a for a in asked if a[1] not in self.records.measured(a[0])][:left]:
            fresh.setdefault(instance, []).append(knobs)
        experiments = [
            Experiment(instance, (instance.default_knobs(), *knobs[start : start + TOGETHER]), ROUNDS)
            for instance, knobs in fresh.items()
            for start in range(0, len(knobs), TOGETHER)
        ]
        for experiment, result in zip(experiments, self.laboratory.build(experiments), strict=True):
            self.built.update({(experiment.instance, k): (experiment, result) for k in experiment.variants[1:]})
        paths = [f"trial {len(self.asked) + i}" for i in range(len(asked))]
        self.asked.update(zip(paths, asked, strict=True))
        return paths

    def result(self, path: str) -> Record:
        """Answer for a candidate from the records, or by measuring it."""
        instance, knobs = self.asked[path]
        if knobs not in self.records.measured(instance):
            if self.trials is not None and self.done >= self.trials:
                raise _BudgetSpent
            if self.done and self.deadline is not None and time.monotonic() > self.deadline:
                raise _BudgetSpent
            self.measure(*self.built.pop((instance, knobs)))
        return self.records.measured(instance)[knobs]

    def measure(self, experiment: Experiment, built: ms.builder.BuilderResult) -> None:
        """Time an experiment and write down what came of each candidate."""
        instance, (default, *candidates) = experiment.instance, experiment.variants
        seconds, error = None, str(built.error_msg)
        if built.artifact_path is not None:
            seconds, error = self.laboratory.run(experiment, str(built.artifact_path))
        if seconds is None and len(candidates) > 1:  # one has spoilt it for all: each by itself
            alone = [Experiment(instance, (default, knobs), ROUNDS) for knobs in candidates]
            for each, result in zip(alone, self.laboratory.build(alone), strict=True):
                self.measure(each, result)
            return
        for i, knobs in enumerate(candidates, 1):
            if seconds is None:
                record = Record(instance, knobs, (), error=" ".join(error.split())[-300:])
            else:
                record = Record(instance, knobs, ratios(seconds)[i], default_seconds(seconds))
            self.records.add(record)
            self.done += 1
            self.advance(self.done)


@derived_object
class _Builder(ms.builder.PyBuilder):  # type: ignore[misc]
    def __init__(self, job: _Job) -> None:
        super().__init__()
        self.job = job

    def build(self, build_inputs: list[ms.builder.BuilderInput]) -> list[ms.builder.BuilderResult]:
        return self.job.build(build_inputs)


@derived_object
class _Runner(ms.runner.PyRunner):  # type: ignore[misc]
    def __init__(self, job: _Job) -> None:
        super().__init__()
        self.job = job

    def run(self, runner_inputs: list[ms.runner.RunnerInput]) -> list[Any]:
        return self.job.run(runner_inputs)


@derived_object
class _Done(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A result that is there."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def done(self) -> bool:
        return True

    def result(self) -> ms.runner.RunnerResult:
        if not self.record.ratios:
            return ms.runner.RunnerResult(None, self.record.error)
        return ms.runner.RunnerResult(list(self.record.ratios), None)


def ratios(seconds: np.ndarray[Any, Any]) -> list[tuple[float, ...]]:
    """Times over those of variant 0 of the same round, the median of the rounds: ``[variant][token count]``."""
    relative = np.median(seconds / seconds[:, :, :1], axis=1)
    return [tuple(float(r) for r in column) for column in relative.T]


def default_seconds(seconds: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Median time of variant 0 for each token count."""
    return tuple(float(s) for s in np.median(seconds[:, :, 0], axis=1))


def tune(
    instances: Mapping[Instance, int],
    records: Records,
    progress: Progress,
    *,
    trials: int | None = None,
    minutes: float | None = None,
    seed: int = 1,
    laboratory: Laboratory | None = None,
) -> dict[Instance, Record]:
    """Search the knobs of kernels, then let the best of each compete with its default at length.

    Records of earlier jobs count as trials, so that an interrupted job continues where it stopped, and teach the cost
    model. ``instances`` says how often a model calls each.

    Returns:
        The verdict of every kernel.

    Raises:
        ValueError: neither or a wrong budget is given, or there is nothing to tune.
        RuntimeError: not one kernel could be measured.

    """
    if trials is None and minutes is None:
        raise ValueError("neither trials nor minutes is given; say how long to search")
    if (trials is not None and trials < 1) or (minutes is not None and minutes <= 0):
        raise ValueError(f"the budget is {trials} trials, {minutes} minutes; expected positive numbers")
    if not instances:
        raise ValueError("there is no kernel to tune: the model was not recognised as an encoder")
    deadline = None
    if minutes is not None:
        deadline = time.monotonic() + max(minutes * 60 - SETTLE_SECONDS * len(instances), minutes * 30)
    laboratory = laboratory or Laboratory.local()
    known = sum(len(records.measured(instance)) for instance in instances)
    left = None if trials is None else max(0, trials - known)
    with progress.phase(f"search the knobs of {len(instances)} kernels", left) as advance:
        job = _Job(laboratory, records, left, deadline, advance)
        try:
            _search(instances, job, seed)
        except BaseException as error:
            if not isinstance(job.stopped or error, _BudgetSpent):
                raise job.stopped or error from None
    if not any(record.ratios for instance in instances for record in records.measured(instance).values()):
        errors = [record.error for i in instances for record in records.measured(i).values() if record.error]
        raise RuntimeError(f"not one candidate could be measured; the last error: {errors[-1] if errors else 'none'}")
    with progress.phase("settle", len(instances)) as advance:
        settle(instances, records, laboratory, advance)
    return {i: verdict for i in instances if (verdict := records.settled(i)) is not None}


def _search(instances: Mapping[Instance, int], job: _Job, seed: int) -> None:
    if job.trials == 0:
        return
    seconds = _measure_defaults(instances, job)
    database = ms.database.MemoryDatabase()
    model = ms.cost_model.XGBModel(
        extractor=metaschedule.Features(),
        config=ms.cost_model.xgb_model.XGBConfig(nthread=1, seed=seed),
        num_warmup_samples=WARM_UP,
        early_stopping_rounds=10,
        verbose_eval=0,
    )
    tasks = [metaschedule.tune_context(instance, seed + i) for i, instance in enumerate(instances)]
    for instance, task in zip(instances, tasks, strict=True):
        found = [r for r in job.records.measured(instance).values() if r.ratios]
        remember(found, task, database, model)
    ms.tune.tune_tasks(
        tasks=tasks,
        task_weights=[uses * seconds[instance] for instance, uses in instances.items()],
        work_dir="",  # the database is in memory; nothing is written there
        max_trials_global=1 << 20,  # the job counts what is really measured
        num_trials_per_iter=BATCH if job.trials is None else max(1, min(BATCH, job.trials - job.done)),
        builder=_Builder(job),
        runner=_Runner(job),
        database=database,
        cost_model=model,
        measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()],
        task_scheduler=ms.task_scheduler.GradientBased(seed=seed),
    )


def _measure_defaults(instances: Iterable[Instance], job: _Job) -> dict[Instance, float]:
    """Seconds that the default takes, over all token counts: the first trial of each instance; 0 if it can't run."""
    defaults = {i: i.default_knobs() for i in instances}
    for path in job.prepare([metaschedule.schedule_of(i, knobs).mod for i, knobs in defaults.items()]):
        job.result(path)
    return {i: sum(job.records.measured(i)[knobs].seconds) for i, knobs in defaults.items()}


def remember(
    found: list[Record], task: ms.TuneContext, database: ms.database.Database, model: ms.cost_model.PyCostModel
) -> None:
    """Give earlier records to MetaSchedule: its search starts from the best of them, its cost model learns from all."""
    if not found:
        return
    token = database.commit_workload(task.mod)
    candidates, results = zip(*map(metaschedule.replay, found), strict=True)
    for candidate, record in zip(candidates, found, strict=True):
        trace = candidate.sch.trace
        database.commit_tuning_record(
            ms.database.TuningRecord(trace, token, list(record.ratios), task.target, candidate.args_info)
        )
    model.update(task, list(candidates), list(results))


def settle(
    instances: Iterable[Instance], records: Records, laboratory: Laboratory, advance: Callable[[int], None]
) -> None:
    """Time the best settings of each kernel and its default in turns, at length, and record the winner.

    The default stays unless another is faster beyond noise and slower at no token count: the search's own best is
    partly luck, being the best of many. Kernels with no trial since they were settled stay as they are, those that
    can't be measured remain without a verdict.
    """
    experiments = [e for instance in instances if (e := _finals(instance, records)) is not None]
    done = 0
    for start in range(0, len(experiments), BATCH):  # what was built is timed soon: an interrupt loses little
        batch = experiments[start : start + BATCH]
        for experiment, result in zip(batch, laboratory.build(batch), strict=True):
            seconds = None
            if result.artifact_path is not None:
                seconds, _ = laboratory.run(experiment, str(result.artifact_path))
            if seconds is not None:
                knobs, found = _winner(experiment.variants, seconds)
                records.add(Record(experiment.instance, knobs, found, default_seconds(seconds), settled=True))
            done += 1
            advance(done)


def _finals(instance: Instance, records: Records) -> Experiment | None:
    """What settles a kernel; None if it is settled, or nothing was measured."""
    before, tried = records.settled(instance), records.measured(instance)
    latest = next((r for r in reversed(records.records) if r.instance == instance), None)
    if latest is before or not any(r.ratios for r in tried.values()):
        return None
    default = instance.default_knobs()
    best = sorted((r for r in tried.values() if r.ratios and r.knobs != default), key=lambda r: r.ratio)
    finalists = [default, *(r.knobs for r in best[:FINALISTS])]
    if before is not None and before.knobs not in finalists:
        finalists.append(before.knobs)
    return Experiment(instance, tuple(finalists), SETTLE_ROUNDS)


def _winner(finalists: Sequence[Knobs], seconds: np.ndarray[Any, Any]) -> tuple[Knobs, tuple[float, ...]]:
    """The setting that won, and its ratios to the default, which stands first."""
    found = ratios(seconds)
    often = np.mean((seconds / seconds[:, :, :1]).mean(axis=0) < 1, axis=0)
    fair = [
        i
        for i in range(1, len(finalists))
        if max(found[i]) <= SLOWER and np.mean(found[i]) <= FASTER and often[i] >= OFTEN
    ]
    winner = min(fair, key=lambda i: float(np.mean(found[i])), default=0)
    return finalists[winner], found[winner]
