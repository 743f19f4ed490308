"""How good the search of ``whet tune`` is: every setting of three kernels is timed, then searches are replayed on that.

    python benchmarks/search_quality.py sweep TABLE.json      # hours of a CPU saved: minutes, but it needs a quiet core
    python benchmarks/search_quality.py replay TABLE.json     # writes TABLE.md and TABLE.svg; needs matplotlib

A replayed search asks the table for its times, so that its seeds cost no machine time: MetaSchedule's search with its
cost model, as ``whet tune`` runs it, and settings drawn at random, none twice.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from report import table
from tvm.s_tir import meta_schedule as ms

from whet.progress import Silent
from whet.runtime.cpu import cpu_model
from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.schedules.isa import isa
from whet.tune.instance import Instance, Knobs
from whet.tune.job import ROUNDS, TOGETHER
from whet.tune.laboratory import Laboratory, Outcome
from whet.tune.machine import cpu_type
from whet.tune.measure import Experiment, ratios
from whet.tune.records import Record, Records
from whet.tune.search import SETTLE_ROUNDS, tune
from whet.tune.space import space

VNNI, AMX = isa("avx512_vnni"), isa("amx_int8")
KERNELS = {
    "sparse": Instance.of(DenseSpec(768, 768, "i8_sparse", residual=True), AMX, 0.2),
    "dense": Instance.of(DenseSpec(384, 384, "i8", residual=True), VNNI),
    "attention": Instance.of(AttentionSpec(12, 64, "i8", 512), VNNI),
}
BUILT_TOGETHER = 16
BEST = 24
"""Settings of a kernel that are timed again."""
SEEDS = 10
SHARE = 0.1
"""Of the space, which a search may look at."""
Array = np.ndarray[Any, Any]


def main() -> None:
    """Sweep or replay."""
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "sweep":
        sweep(path)
    else:
        replay(path)


def sweep(path: Path) -> None:
    """Time every setting in turns with the default; what the file has already is not timed again.

    The best of hundreds is partly luck: those that look best are timed again, at length, and so are those that look
    best then.
    """
    document = json.loads(path.read_text()) if path.exists() else {"kernels": {}}
    document |= {"command": "python benchmarks/search_quality.py sweep", "cpu": f"{cpu_model()}, {cpu_type()}"}
    laboratory = Laboratory.local()

    def measure(instance: Instance, settings: list[Knobs], rounds: int) -> None:
        table = document["kernels"][name]["settings"]
        for batch in batches(settings, TOGETHER * BUILT_TOGETHER):
            default = instance.default_knobs()
            experiments = [Experiment(instance, (default, *knobs), rounds) for knobs in batches(batch, TOGETHER)]
            for experiment, built in zip(experiments, laboratory.build(experiments), strict=True):
                outcome: Outcome = None, str(built.error_msg)
                if built.artifact_path is not None:
                    outcome = laboratory.start(experiment, str(built.artifact_path)).result()
                new = rows(experiment, outcome)
                table[:] = [s for s in table if s["knobs"] not in [n["knobs"] for n in new]] + new
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document))
            part.rename(path)

    for name, instance in KERNELS.items():
        table = document["kernels"].setdefault(name, {"kernel": instance.to_json(), "settings": []})["settings"]
        known = [setting["knobs"] for setting in table]
        left = [instance.knobs(values) for values in space(instance) if values not in known]
        # Neighbours would otherwise share whatever the machine does at the time.
        np.random.default_rng(0).shuffle(left)  # type: ignore[arg-type]
        measure(instance, left, ROUNDS)
        while doubtful := [s for s in best_of(table) if s["rounds"] < SETTLE_ROUNDS]:
            measure(instance, [instance.knobs(s["knobs"]) for s in doubtful], SETTLE_ROUNDS)


def best_of(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that look best."""
    return sorted((s for s in table if "ratios" in s), key=lambda s: mean(s["ratios"]))[:BEST]


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Parts of a list, the last perhaps shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def rows(experiment: Experiment, outcome: Outcome) -> list[dict[str, Any]]:
    """One entry of the table for each candidate."""
    seconds, error = outcome
    entries = []
    for i, knobs in enumerate(experiment.variants[1:], 1):
        entry: dict[str, Any] = {"knobs": asdict(knobs), "rounds": experiment.rounds}
        if seconds is None:
            entry["error"] = error[-200:]
        else:
            entry["ratios"] = [round(r, 4) for r in ratios(seconds)[i]]
        entries.append(entry)
    return entries


@dataclass
class Table:
    """Stands for ``whet.tune.laboratory.Laboratory``: answers with the times of a sweep."""

    instance: Instance
    ratios: dict[Knobs, list[float]]

    def build(self, experiments: list[Experiment]) -> list[ms.builder.BuilderResult]:
        """Build nothing."""
        return [ms.builder.BuilderResult("nowhere", None) for _ in experiments]

    def start(self, experiment: Experiment, _path: str) -> Answer:
        """Look the candidates up."""
        times = np.ones((len(self.instance.tokens), experiment.rounds, len(experiment.variants)))
        for i, knobs in enumerate(experiment.variants[1:], 1):
            times[:, :, i] = np.array(self.ratios[knobs])[:, None]
        return Answer(times)


@dataclass
class Answer:
    """A timing that is done."""

    times: Array

    def done(self) -> bool:
        """Whether it is."""
        return True

    def result(self) -> Outcome:
        """The times."""
        return self.times, ""


def replay(path: Path) -> None:
    """Search the tables with many seeds; write what was found after how many trials."""
    document = json.loads(path.read_text())
    lines: list[list[str]] = []
    curves = {}
    for name, swept in document["kernels"].items():
        instance = Instance.from_json(swept["kernel"])
        known = {instance.knobs(s["knobs"]): s["ratios"] for s in swept["settings"] if "ratios" in s}
        best, default = min(map(mean, known.values())), mean(known[instance.default_knobs()])
        trials = int(len(known) * SHARE)
        searched = np.array([best_so_far(search(instance, known, 2 * trials, seed)) for seed in range(SEEDS)]) / best
        drawn = np.array([best_so_far(draw_random(known, 2 * trials, seed)) for seed in range(SEEDS)]) / best
        curves[name, str(instance), trials] = searched, drawn
        numbers = [
            f"{median(found[:, trials - 1]) - 1:+.1%} ({max(found[:, trials - 1]) - 1:+.1%})"
            for found in (searched, drawn)
        ]
        lines.append([str(instance), str(len(known)), f"{best / default - 1:+.1%}", str(trials), *numbers])
    head = ["kernel", "settings", "best of all, over the default", f"trials ({SHARE:.0%})"]
    head += [f"whet tune: time over the best, median (worst) of {SEEDS} seeds", "random: the same"]
    text = [f"# What a search finds in {SHARE:.0%} of the trials of a sweep", document["cpu"] + "."]
    text += ["`python benchmarks/search_quality.py sweep TABLE.json`, then `… replay TABLE.json`.", table(head, lines)]
    picture = path.with_suffix(".svg")
    text.append(f"![Best so far against trials]({picture.name})")
    path.with_suffix(".md").write_text("\n\n".join(t for t in text if t) + "\n", encoding="utf-8")
    draw(curves, picture)
    print(text[3])


def mean(values: list[float]) -> float:
    """What a search makes smaller."""
    return sum(values) / len(values)


def search(instance: Instance, known: dict[Knobs, list[float]], trials: int, seed: int) -> list[float]:
    """Ratios in the order in which ``whet tune`` measures them."""
    with tempfile.TemporaryDirectory() as folder:
        records = Records.open(folder, isa(instance.isa))
        laboratory: Any = Table(instance, known)
        tune({instance: 1}, records, Silent(), trials=trials, seed=seed + 1, laboratory=laboratory)
        return [record.ratio for record in measured(records)][:trials]


def measured(records: Records) -> list[Record]:
    """Trials in their order."""
    return [record for record in records.records if not record.settled]


def draw_random(known: dict[Knobs, list[float]], trials: int, seed: int) -> list[float]:
    """Ratios of settings drawn at random, none twice."""
    order = np.random.default_rng(seed).permutation(len(known))[:trials]
    every = list(known.values())
    return [mean(every[i]) for i in order]


def best_so_far(found: list[float]) -> Array:
    """The least of the first, of the first two, and so on."""
    return np.minimum.accumulate(np.array(found))


def draw(curves: dict[tuple[str, str, int], tuple[Array, Array]], path: Path) -> None:
    """Median and range of the seeds of both searches for each kernel."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.6), squeeze=False)
    for axis, ((_, title, share), found) in zip(axes[0], curves.items(), strict=True):
        for label, colour, runs in zip(("whet tune", "random"), ("C0", "C1"), found, strict=True):
            trials = np.arange(1, runs.shape[1] + 1)
            axis.plot(trials, np.median(runs, 0), color=colour, label=label)
            axis.fill_between(trials, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.axvline(share, color="black", linewidth=0.5, linestyle=":")
        axis.axhline(1.03, color="black", linewidth=0.5, linestyle=":")
        axis.set(title=title, xlabel="trials", ylabel="best so far, over the best of all", ylim=(0.995, 1.2))
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Median and range of the seeds; dotted: a tenth of the settings, and 3 %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
