"""The tuning job: MetaSchedule's scheduler, evolutionary search and cost model over the kernels of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm.s_tir import meta_schedule as ms

from whet.progress import Board, TaskProgress
from whet.tune import metaschedule
from whet.tune.instance import Instance, Knobs
from whet.tune.job import BudgetSpentError, Builder, Job, Runner
from whet.tune.laboratory import Laboratory, WorkersLostError
from whet.tune.measure import Experiment, default_seconds, ratios
from whet.tune.records import Record, Records
from whet.tune.space import space

BATCH = 8
"""Trials of a kernel between two updates of the cost model."""
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
WARM_UP = 8
"""Trials before the cost model is asked."""


def tune(
    instances: Mapping[Instance, int],
    records: Records,
    progress: TaskProgress,
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
    names, sizes = zip(*((str(i), sum(1 for _ in space(i))) for i in instances), strict=True)
    seconds = None if minutes is None else minutes * 60
    with progress.tasks(f"search the knobs of {len(instances)} kernels", names, sizes, left, seconds) as board:
        standing = _Standing(instances, records, board)
        job = Job(laboratory, records, left, deadline, standing.note)
        try:
            _search(instances, job, seed)
        except BaseException as error:
            stopped = job.stopped or error
            if not isinstance(stopped, BudgetSpentError | WorkersLostError):
                job.collect()  # what is measured is kept
            if not isinstance(stopped, BudgetSpentError):
                raise stopped from None
        job.collect(wait=True)
    if not any(record.ratios for instance in instances for record in records.measured(instance).values()):
        errors = [record.error for i in instances for record in records.measured(i).values() if record.error]
        raise RuntimeError(f"not one candidate could be measured; the last error: {errors[-1] if errors else 'none'}")
    with progress.phase("settle", len(instances)) as advance:
        settle(instances, records, laboratory, advance)
    return {i: verdict for i in instances if (verdict := records.settled(i)) is not None}


class _Standing:
    """Shows how far the search is: of every kernel the best so far, of all the gain, each weighed by its time."""

    def __init__(self, instances: Mapping[Instance, int], records: Records, board: Board) -> None:
        self.uses, self.records, self.board = instances, records, board
        self.fresh = 0
        for instance in instances:
            self._show(instance)

    def note(self, record: Record) -> None:
        self.fresh += 1
        self._show(record.instance)

    def _show(self, instance: Instance) -> None:
        tried = self.records.measured(instance)
        best = min(tried.values(), key=lambda r: r.ratio, default=None)
        what = f"best {_time(best)}, {1 / best.ratio - 1:+.1%}" if best is not None and best.ratios else ""
        self.board.task(list(self.uses).index(instance), len(tried), what)
        self.board.all(self.fresh, f"gain {self._gain():+.1%}")

    def _gain(self) -> float:
        """What the best of every kernel gain in a model, if its other kernels took no time."""
        before = after = 0.0
        for instance, uses in self.uses.items():
            measured = [r for r in self.records.measured(instance).values() if r.ratios]
            if measured:
                time = uses * sum(measured[-1].seconds)
                before, after = before + time, after + time * min(1.0, *(r.ratio for r in measured))
        return before / after - 1 if after else 0.0


def _time(record: Record) -> str:
    """Time of a record's setting at the largest of the token counts."""
    seconds = record.seconds[-1] * record.ratios[-1]
    return f"{seconds * 1e6:.0f} µs for {record.instance.tokens[-1]} tokens"


def _search(instances: Mapping[Instance, int], job: Job, seed: int) -> None:
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
    tasks = {instance: metaschedule.tune_context(instance, seed + i) for i, instance in enumerate(instances)}
    for instance in dict.fromkeys(r.instance for r in job.records.records):
        task = tasks.get(instance)
        remember(list(job.records.measured(instance).values()), task, database, model)
    ms.tune.tune_tasks(
        tasks=list(tasks.values()),
        task_weights=[uses * seconds[instance] for instance, uses in instances.items()],
        work_dir="",  # the database is in memory; nothing is written there
        max_trials_global=1 << 20,  # the job counts what is really measured
        num_trials_per_iter=BATCH if job.trials is None else max(1, min(BATCH, job.trials - job.done)),
        builder=Builder(job),
        runner=Runner(job),
        database=database,
        cost_model=model,
        measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()],
        task_scheduler=ms.task_scheduler.GradientBased(seed=seed),
    )


def _measure_defaults(instances: Iterable[Instance], job: Job) -> dict[Instance, float]:
    """Seconds that the default takes, over all token counts: the first trial of each instance; 0 if it can't run."""
    defaults = {i: i.default_knobs() for i in instances}
    paths = job.prepare([metaschedule.schedule_of(i, knobs).mod for i, knobs in defaults.items()])
    job.start(paths)
    for path in paths:
        job.result(path)
    return {i: sum(job.records.measured(i)[knobs].seconds) for i, knobs in defaults.items()}


def remember(
    tried: list[Record], task: ms.TuneContext | None, database: ms.database.Database, model: ms.cost_model.PyCostModel
) -> None:
    """Give the records of a kernel to MetaSchedule: the cost model learns from them.

    If the kernel is a ``task`` of this job, its search starts from the best of them.
    """
    found = [record for record in tried if record.ratios]
    if not found:
        return
    candidates, results = zip(*map(metaschedule.replay, found), strict=True)
    if task is not None:
        token = database.commit_workload(task.mod)
        for candidate, record in zip(candidates, found, strict=True):
            trace = candidate.sch.trace
            database.commit_tuning_record(
                ms.database.TuningRecord(trace, token, list(record.ratios), task.target, candidate.args_info)
            )
    model.update(task or metaschedule.context(found[0].instance), list(candidates), list(results))


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
        timings = [
            None if result.artifact_path is None else laboratory.start(experiment, str(result.artifact_path))
            for experiment, result in zip(batch, laboratory.build(batch), strict=True)
        ]
        for experiment, timing in zip(batch, timings, strict=True):
            seconds = None if timing is None else timing.result()[0]
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
