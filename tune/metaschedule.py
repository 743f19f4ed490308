"""How a kernel instance becomes a MetaSchedule task.

Schedule primitives can't make our kernels (loops bounded by data, symbolic shapes), so the workload is a small function
that stands for the instance and is named by an attribute. A schedule samples every knob with ``sample_categorical`` and
annotates the block with it: traces, mutation, deduplication, database and cost model then work as for any schedule.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import tvm
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.script import tirx as T

from whet.schedules.attention import AttentionSpec
from whet.schedules.cost import ACTIVATION
from whet.schedules.isa import isa
from whet.tune.instance import Instance, Knobs, key
from whet.tune.records import Record
from whet.tune.space import Space, space

KNOB = "whet.knob."
INSTANCE = "whet.instance"
BLOCK = "kernel"
FEATURES = 24
"""Columns of a row of features; the longest is that of a block-sparse layer."""


@T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
def _stand_in(out: T.Buffer((1,), "int32")):  # type: ignore[no-untyped-def,valid-type] # noqa: ANN202
    with T.sblock("kernel"):
        T.reads()
        T.writes(out[0])
        out[0] = 0


def workload(instance: Instance) -> tvm.IRModule:
    """Return the module that stands for an instance; equal instances have equal modules."""
    return tvm.IRModule({"main": _stand_in.with_attr("global_symbol", "main").with_attr(INSTANCE, key(instance))})


def instance_of(module: tvm.IRModule) -> Instance:
    """Return the instance that a module stands for."""
    return Instance.from_json(json.loads(str(module["main"].attrs[INSTANCE])))


def knob_values(module: tvm.IRModule) -> dict[str, int]:
    """Read the knobs that a schedule chose."""
    schedule = s_tir.Schedule(module)
    block = schedule.get(schedule.get_sblock(BLOCK))
    found = {str(name): int(value) for name, value in block.annotations.items()}
    return {name.removeprefix(KNOB): value for name, value in found.items() if name.startswith(KNOB)}


def sample(schedule: s_tir.Schedule, of: Space, values: dict[str, int] | None = None) -> None:
    """Let ``schedule`` choose each knob, at random or as ``values`` say."""
    block = schedule.get_sblock(BLOCK)
    for name, choices in of.choices.items():
        decision = None if values is None else choices.index(values[name])
        chosen = schedule.sample_categorical(list(choices), [1 / len(choices)] * len(choices), decision)
        schedule.annotate(block, KNOB + name, chosen)


def schedule_of(instance: Instance, knobs: Knobs) -> s_tir.Schedule:
    """Return the schedule that chooses these knobs, as the search itself would have made it."""
    schedule = s_tir.Schedule(workload(instance))
    sample(schedule, space(instance), asdict(knobs))
    schedule.enter_postproc()
    return schedule


def tune_context(instance: Instance, seed: int) -> ms.TuneContext:
    """Return the MetaSchedule task of an instance."""
    of = space(instance)
    size = sum(1 for _ in of)

    def sample_all(schedule: s_tir.Schedule) -> None:
        sample(schedule, of)

    generator = ms.space_generator.ScheduleFn(
        sample_all, sch_rules=[], postprocs=[_Accepted(of)], mutator_probs={_ChangeOne(seed): 1.0}
    )
    strategy = ms.search_strategy.EvolutionarySearch(
        population_size=min(64, size), init_min_unmeasured=1, max_fail_count=50, genetic_num_iters=3
    )
    return context(
        instance,
        space_generator=generator,
        search_strategy=strategy,
        task_name=str(instance),
        rand_state=seed,
        num_threads=1,
    )


def context(instance: Instance, **options: Any) -> ms.TuneContext:
    """Return what MetaSchedule knows of an instance; without options enough for a cost model."""
    # A context imports TVM's tensor intrinsics, whose parsing takes 20 to 40 s (those of GPUs most); we use none.
    with patch.dict(sys.modules, {"tvm.s_tir.tensor_intrin": ModuleType("tvm.s_tir.tensor_intrin")}):
        return ms.TuneContext(workload(instance), target=tvm.target.Target(isa(instance.isa).target), **options)


@derived_object
class _Accepted(ms.postproc.PyPostproc):  # type: ignore[misc]
    """Refuses what the space does not hold."""

    def __init__(self, of: Space) -> None:
        super().__init__()
        self.space = of

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        del context

    def apply(self, sch: s_tir.Schedule) -> bool:
        return self.space.accepts(knob_values(sch.mod))

    def clone(self) -> Any:
        return _Accepted(self.space)


@derived_object
class _ChangeOne(ms.mutator.PyMutator):  # type: ignore[misc]
    """Changes one knob, to a neighbouring value more often than not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        del context

    def apply(self, trace: s_tir.schedule.Trace, _seed: Any = None) -> s_tir.schedule.Trace | None:
        sampled = [i for i in trace.insts if i.kind.name == "SampleCategorical" and len(i.attrs[0]) > 1]
        if not sampled:
            return None
        instruction = self.random.choice(sampled)
        now, count = int(trace.decisions[instruction]), len(instruction.attrs[0])
        near = [d for d in (now - 1, now + 1) if 0 <= d < count]
        others = near if self.random.random() < 0.6 else [d for d in range(count) if d != now]
        return trace.with_decision(instruction, self.random.choice(others), remove_postproc=True)

    def clone(self) -> Any:
        return _ChangeOne(self.random.randrange(1 << 30))


@derived_object
class Features(ms.feature_extractor.PyFeatureExtractor):  # type: ignore[misc]
    """What the cost model knows of a candidate: one row of the instance's sizes and the knobs.

    TVM's own features describe loops with constant bounds, which our kernels do not have.
    """

    def extract_from(self, context: ms.TuneContext, candidates: list[ms.MeasureCandidate]) -> list[Any]:
        """One tensor for each candidate."""
        instance = instance_of(context.mod)
        return [tvm.runtime.tensor(features(instance, knob_values(c.sch.mod))) for c in candidates]


def features(instance: Instance, values: dict[str, int]) -> np.ndarray[Any, Any]:
    """``(1, FEATURES)`` float64: sizes and knobs in columns that mean the same for all instances of one op."""
    spec = instance.spec
    if isinstance(spec, AttentionSpec):
        row: list[Any] = [1, spec.heads, spec.head_size, spec.precision == "i8", spec.max_length]
        row += [*values.values(), values["accumulators"] / values["queries"]]
    else:
        rows, tiles, chunk = values["rows"], values["tiles"], values["chunk"]
        kind = [spec.weight == "f32", spec.weight == "i8_sparse", spec.block_rows, instance.density]
        ends = [ACTIVATION[spec.activation], spec.residual, spec.per_token, spec.output == "tiles"]
        row = [0, np.log2(spec.out_features), np.log2(spec.in_features), *kind, *ends]
        row += [rows * tiles, spec.out_features / chunk, chunk / rows, *values.values()]
    return np.array([row + [0] * (FEATURES - len(row))], np.float64)


def replay(record: Record) -> tuple[ms.MeasureCandidate, ms.runner.RunnerResult]:
    """Return a record as the candidate and the result that it was made of."""
    schedule = schedule_of(record.instance, record.knobs)
    candidate = ms.MeasureCandidate(schedule, ms.arg_info.ArgInfo.from_entry_func(schedule.mod))
    return candidate, ms.runner.RunnerResult(list(record.ratios), None)
