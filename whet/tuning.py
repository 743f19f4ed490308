"""Tune the kernels of a model: what ``whet tune`` runs."""

from __future__ import annotations

from collections import Counter
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.compiler import import_model, length_limit
from whet.passes.choose_kernels import TYPICAL_TOKENS
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.progress import Progress, Silent, TaskProgress
from whet.schedules import isa as isas
from whet.tune.instance import Instance
from whet.tune.machine import Machine
from whet.tune.records import Records
from whet.tune.report import TuningReport, report_records

if TYPE_CHECKING:
    from whet.frontend.model import Model


def kernel_instances(
    model: Model,
    target: isas.Isa,
    *,
    quantisation: QuantisationConfig | None = None,
    sparsity: float = 0.0,
    block_rows: int = 4,
    tokens: int = TYPICAL_TOKENS,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Counter[Instance]:
    """Every kernel with knobs that an int8 compilation of ``model`` uses, with the count of its uses.

    ``quantisation`` decides between per-token and static scales, which are different kernels. The counter is empty for
    a model that was not recognised as an encoder.
    """
    found: Counter[Instance] = Counter()

    def note(spec: Any, isa: isas.Isa, density: float) -> None:
        found[Instance.of(spec, isa, density)] += 1

    if model.dialect:
        options = Options(
            isas=(target,),
            max_length=length_limit(model, max_length),
            quantisation=quantisation or QuantisationConfig(method="minmax"),
            sparsity=sparsity,
            block_rows=block_rows,
            tokens=tokens,
            tuned=note,
        )
        # Scales do not change kernels, so one short request is calibration enough.
        request = [np.zeros(4, np.int64)]
        run_pipeline(model.module, options, request, request, progress or Silent())
    return found


def tune(
    source: str | PathLike[str] | object,
    records: str | PathLike[str],
    *,
    trials: int | None = None,
    minutes: float | None = None,
    isa: str = "host",
    task: Any = None,
    pooling: Any = None,
    tokenizer: Any = None,
    quantisation: QuantisationConfig | None = None,
    sparsity: float = 0.0,
    block_rows: int = 4,
    tokens: int = TYPICAL_TOKENS,
    max_length: int | None = None,
    seed: int = 1,
    tracker: str | None = None,
    key: str | None = None,
    progress: TaskProgress | None = None,
) -> TuningReport:
    """Search the best settings of every kernel of a model, and keep them in the folder ``records``.

    Kernels are timed on this machine, or on the workers of a tracker, all at the same time. They are built here.

    ``whet.compile(…, records=records)`` with the same options then uses them. The job can be interrupted at any moment
    and called again: what was measured is kept, and counts.

    Args:
        source: the model.
        records: the folder; made if it does not exist.
        trials: settings to measure over all kernels, with those that the folder has.
        minutes: time to search; with both, whichever ends first.
        isa: one instruction set that the machine has which times kernels; ``"host"``: its best.
        task: as all up to ``max_length``, what ``whet.compile`` is given for the same model.
        pooling: so too.
        tokenizer: so too.
        quantisation: so too.
        sparsity: so too.
        block_rows: so too.
        tokens: so too.
        max_length: so too.
        seed: of the search.
        tracker: ``host:port`` of TVM's RPC tracker.
        key: that of its workers which are meant; they have CPUs of one type.
        progress: told of every phase.

    Returns:
        What was gained, for the kernels of this model.

    Raises:
        ValueError: an argument is wrong, no budget is given, no encoder was recognised, or the tracker has no workers.
        ConnectionError: there is no tracker.
        RuntimeError: not one candidate could be measured, or the workers died.
        ModuleNotFoundError: xgboost, psutil or cloudpickle is not installed.

    """
    from whet.tune import search  # noqa: PLC0415 -- needs packages that compiling does not
    from whet.tune.laboratory import Laboratory  # noqa: PLC0415

    if (tracker is None) != (key is None):
        raise ValueError(
            f"the tracker is {tracker!r}, the key {key!r}; expected both, or neither to tune on this machine"
        )
    if tracker is None:
        laboratory, machine = Laboratory.local(), Machine.here()
    else:
        from whet.tune import remote, worker  # noqa: PLC0415

        laboratory, machine = remote.laboratory(worker.address(tracker), str(key))
    target = machine.best_isa() if isa == "host" else isas.isa(isa)
    if reason := machine.why_not(target):
        raise ValueError(f"isa is {isa!r}, but of {machine.name}: {reason}; tune on a machine that has it")
    progress = progress or Silent()
    with progress.phase("import"):
        model = import_model(source, task=task, pooling=pooling, tokenizer=tokenizer)
    instances = kernel_instances(
        model,
        target,
        quantisation=quantisation,
        sparsity=sparsity,
        block_rows=block_rows,
        tokens=tokens,
        max_length=max_length,
        progress=progress,
    )
    Path(records).mkdir(parents=True, exist_ok=True)
    opened = Records.open(records, target, machine.cpu)
    search.tune(instances, opened, progress, trials=trials, minutes=minutes, seed=seed, laboratory=laboratory)
    return report_records([opened], list(instances))
