"""What MetaSchedule's search wants measured, measured: its builder and runner, which answer from records if they can.

Candidates are built and timed several at a time. Where there are several workers, MetaSchedule goes on with other
tasks while they time one; its futures are those of this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from whet.tune import metaschedule
from whet.tune.instance import Instance, Knobs
from whet.tune.laboratory import Laboratory, Outcome, Timing, check
from whet.tune.measure import Experiment, default_seconds, ratios
from whet.tune.records import Record, Records

ROUNDS = 7
"""Turns of a candidate and the default in one trial."""
TOGETHER = 4
"""Candidates that are built, and timed in turns, with one default."""

T = TypeVar("T")
_Candidate = tuple[Instance, Knobs]


class BudgetSpentError(Exception):
    """No trials or no time are left."""


@dataclass
class Job:
    """Does what MetaSchedule wants measured, unless records already hold it, and keeps what comes out."""

    laboratory: Laboratory
    records: Records
    trials: int | None
    """How many settings may still be measured."""
    deadline: float | None
    advance: Callable[[Record], None]
    """Told of every record that is made."""
    promised: int = 0
    """Settings that were given to the laboratory."""
    done: int = 0
    stopped: BaseException | None = None
    """What ended the search; TVM passes an exception on, but not its type."""
    asked: dict[str, _Candidate] = field(default_factory=dict)
    """Candidates by the path that stands for them in MetaSchedule's eyes."""
    built: dict[_Candidate, _Built] = field(default_factory=dict)
    running: dict[_Candidate, _Running] = field(default_factory=dict)

    def prepare(self, modules: list[tvm.IRModule]) -> list[str]:
        """Build what no record answers for, several candidates with one default; returns the path of each."""
        self.collect()
        asked = []
        for module in modules:
            instance = metaschedule.instance_of(module)
            asked.append((instance, instance.knobs(metaschedule.knob_values(module))))
        paths = [f"trial {len(self.asked) + i}" for i in range(len(asked))]
        self.asked.update(zip(paths, asked, strict=True))
        fresh: dict[Instance, list[Knobs]] = {}
        for instance, knobs in [a for a in asked if not self._known(a)][: self._left()]:
            fresh.setdefault(instance, []).append(knobs)
        experiments = [
            Experiment(instance, (instance.default_knobs(), *knobs[start : start + TOGETHER]), ROUNDS)
            for instance, knobs in fresh.items()
            for start in range(0, len(knobs), TOGETHER)
        ]
        for built in self._build(experiments):
            self.promised += len(built.candidates)
            self.built.update(dict.fromkeys(built.candidates, built))
        return paths

    def _known(self, candidate: _Candidate) -> bool:
        instance, knobs = candidate
        return candidate in self.running or candidate in self.built or knobs in self.records.measured(instance)

    def _left(self) -> int | None:
        """How many settings may still be promised; None: any number."""
        if self.promised and self._late():
            return 0
        return None if self.trials is None else max(0, self.trials - self.promised)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _build(self, experiments: list[Experiment]) -> list[_Built]:
        results = self.laboratory.build(experiments) if experiments else []
        pairs = zip(experiments, results, strict=True)
        return [
            _Built(e, None if r.artifact_path is None else str(r.artifact_path), str(r.error_msg)) for e, r in pairs
        ]

    def start(self, paths: list[str]) -> None:
        """Start to measure candidates that were built, with those that were built with them."""
        for path in paths:
            built = self.built.get(self.asked[path])
            if built is not None and not (self.done and self._late()):
                for candidate in built.candidates:
                    del self.built[candidate]
                self._start(built)
                self.collect()

    def _start(self, built: _Built) -> None:
        timing = None if built.path is None else self.laboratory.start(built.experiment, built.path)
        self.running.update(dict.fromkeys(built.candidates, _Running(built, timing)))

    def done_with(self, path: str) -> bool:
        """Whether ``result`` needs not wait."""
        running = self.running.get(self.asked[path])
        return running is None or running.done()

    def result(self, path: str) -> Record:
        """Answer for a candidate from the records, or wait until it is measured."""
        instance, knobs = candidate = self.asked[path]
        while candidate in self.running:
            self._finish(self.running[candidate])
        if knobs not in self.records.measured(instance):
            raise BudgetSpentError
        return self.records.measured(instance)[knobs]

    def collect(self, *, wait: bool = False) -> None:
        """Write down what is measured; all that is being measured, if ``wait``."""
        while finished := next((r for r in self.running.values() if wait or r.done()), None):
            self._finish(finished)

    def _finish(self, running: _Running) -> None:
        """Write down what came of each candidate of an experiment."""
        instance, (default, *candidates) = running.built.experiment.instance, running.built.experiment.variants
        seconds, error = running.result()
        for candidate in running.built.candidates:
            del self.running[candidate]
        if seconds is None and len(candidates) > 1:  # one has spoilt it for all: each by itself
            for built in self._build([Experiment(instance, (default, knobs), ROUNDS) for knobs in candidates]):
                self._start(built)
            return
        for i, knobs in enumerate(candidates, 1):
            if seconds is None:
                record = Record(instance, knobs, (), error=" ".join(error.split())[-300:])
            else:
                record = Record(instance, knobs, ratios(seconds)[i], default_seconds(seconds))
            self.records.add(record)
            self.done += 1
            self.advance(record)

    def noting(self, work: Callable[[], T]) -> T:
        """Do what TVM asks for; note what stops it."""
        try:
            return work()
        except BaseException as stopped:
            self.stopped = stopped
            raise


@dataclass(frozen=True)
class _Built:
    experiment: Experiment
    path: str | None
    error: str

    @property
    def candidates(self) -> list[_Candidate]:
        return [(self.experiment.instance, knobs) for knobs in self.experiment.variants[1:]]


@dataclass(frozen=True)
class _Running:
    """What is being timed, or could not be built."""

    built: _Built
    timing: Timing | None

    def done(self) -> bool:
        return self.timing is None or self.timing.done()

    def result(self) -> Outcome:
        return (None, check(self.built.error)) if self.timing is None else self.timing.result()


@derived_object
class Builder(ms.builder.PyBuilder):  # type: ignore[misc]
    """Builds what the job has no record of."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def build(self, build_inputs: list[ms.builder.BuilderInput]) -> list[ms.builder.BuilderResult]:
        """Give each candidate a path that stands for it."""
        paths = self.job.noting(lambda: self.job.prepare([each.mod for each in build_inputs]))
        return [ms.builder.BuilderResult(path, None) for path in paths]


@derived_object
class Runner(ms.runner.PyRunner):  # type: ignore[misc]
    """Starts to time what was built."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, runner_inputs: list[ms.runner.RunnerInput]) -> list[Any]:
        """Return a future for each candidate."""
        paths = [str(each.artifact_path) for each in runner_inputs]
        self.job.noting(lambda: self.job.start(paths))
        return [_Trial(self.job, path) for path in paths]


@derived_object
class _Trial(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A candidate that is measured, or being measured."""

    def __init__(self, job: Job, path: str) -> None:
        super().__init__()
        self.job, self.path = job, path

    def done(self) -> bool:
        return self.job.done_with(self.path)

    def result(self) -> ms.runner.RunnerResult:
        record = self.job.noting(lambda: self.job.result(self.path))
        if not record.ratios:
            return ms.runner.RunnerResult(None, record.error)
        return ms.runner.RunnerResult(list(record.ratios), None)
