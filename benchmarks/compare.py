"""Whet beside every engine that runs the same encoder on this CPU: all of the comparison, by one command.

    python benchmarks/compare.py                    # hours; an interrupted run goes on where it stopped
    python benchmarks/compare.py --quick            # minutes: few cases and rounds, results below build/bench

Makes each engine an environment, makes the models, measures, and writes benchmarks/results/comparison-….json, .md and
.svg. Same weights, same token ids, threads pinned to as many cores. One process per engine and weights, all of a shape
alive at once; they take turns in bursts of 50 ms, so whatever else the machine does meets all alike. A ratio is taken
within a round; the table gives the median of the rounds and their 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from environments import Unavailable, make_environment
from machine import measure_peaks
from models import SHAPES, WEIGHTS, prepare, text_lengths
from workers import Failed, Worker

from whet.bench import choose_cpus
from whet.host import host_isa
from whet.runtime.cpu import cpu_flags, cpu_model

HERE = Path(__file__).parent
ROOMS = ("frontend", "passes", "runtime", "schedules", "whet")

BURST_SECONDS = 0.05
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 5
"""Contestants that take so long for a pass are out after so many rounds, and all their passes are timed."""
HOPELESS_SECONDS = 20.0
"""… and those are not timed again: the pass that warmed them up is the result."""

ENGINES: dict[str, dict[str, tuple[str, ...]]] = {
    "whet": {
        "int8": tuple(WEIGHTS),
        "int8 for batches": ("80% 4x4", "90% 4x4"),
        "bf16": ("dense",),
        "fp32": ("dense",),
        "encode": ("dense", "80% 4x4"),
    },
    "onnxruntime": {
        f"{precision}{graph}": ("dense",)
        for precision in ("fp32", "int8 dynamic", "int8 static")
        for graph in ("", " optimised")
    },
    "openvino": {
        **dict.fromkeys(("fp32", "bf16", "int8", "int8 + bf16"), ("dense",)),
        "int8 sparse": ("80% 4x4", "90% 4x4"),
    },
    "deepsparse": {"int8": tuple(WEIGHTS)},
    "neural_engine": {"int8": ("dense",), "int8 sparse": ("80% 4x4", "90% 4x4")},
    "torch": {"fp32": ("dense",), "bf16": ("dense",)},
    "zentorch": {"fp32": ("dense",), "bf16": ("dense",)},
    "tvm": {"fp32": ("dense",)},
}
"""Variants of each engine and the weights that each runs; an engine that does not look at zeros runs dense ones.

The Neural Engine wants blocks of 4 outputs × 1 input, so 4×4 blocks are its own as well, and 1×4 are not.
"""
BF16_FLAG = "avx512_bf16"
"""CPUs without it take no part in bf16: who runs it there emulates it."""
EXPORTERS = {"neural_engine": ("neural_engine_export", "old.onnx")}
"""Engines whose graph another environment writes, and the file that it writes."""
ANY_SHAPE = ("onnxruntime", "openvino", "neural_engine")
"""Engines with models for any shape, so that requests of different lengths may also go in small batches."""

SEQUENCES = (16, 32, 64, 128, 384, 512)
MIXED, TEXTS = "mixed-b32", "texts"
MIXED_WEIGHTS = ("dense", "80% 4x4")
FLOORS = {"weights": ("dense", "80% 4x4"), "sequences": (32, 128, 384)}


@dataclass(frozen=True)
class Contestant:
    """One engine in one variant with one set of weights."""

    engine: str
    variant: str
    weights: str

    def __str__(self) -> str:
        return f"{self.engine} {self.variant}, {self.weights}"


@dataclass
class Run:
    """What a command is to do, and what is known so far."""

    work: Path
    threads: int
    rounds: int
    clock: str
    path: Path
    document: dict[str, Any]
    cpus: list[int]
    pythons: dict[str, Path | Unavailable] = field(default_factory=dict)
    failures: dict[Contestant, str] = field(default_factory=dict)

    def save(self) -> None:
        """Write the document, completely or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1, ensure_ascii=False))
        part.rename(self.path)


def main() -> None:
    """Read the command line and do all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[e for e in ENGINES if e != "whet"], help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), help="default: all")
    parser.add_argument("--cases", nargs="+", help="default: all; " + ", ".join(cases()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant in each case")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, on a core that others use"
    )
    parser.add_argument("--quick", action="store_true", help="see whether everything runs; no results to publish")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run measured")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where everything is made")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu adds up the time of all threads; expected --threads 1 with it")
    if arguments.quick:
        arguments.rounds = 3
        arguments.weights = arguments.weights or ["dense", "80% 4x4"]
        arguments.cases = arguments.cases or ["b1-s32", "b1-s128", MIXED, "texts-b1"]
    arguments.weights = arguments.weights or list(WEIGHTS)
    known = cases()
    if unknown := [c for c in arguments.cases or () if c not in known]:
        parser.error(f"case {unknown[0]!r} is unknown; expected some of {', '.join(known)}")
    selected = {name: lengths for name, lengths in known.items() if name in (arguments.cases or known)}
    engines = ["whet", *(arguments.peers or [e for e in ENGINES if e != "whet"])]

    run = start(arguments)
    run.document["machine"] |= measure_peaks(arguments.work, run.cpus[0])
    print(json.dumps(run.document["machine"], indent=1), file=sys.stderr)
    for shape in arguments.shapes:
        contestants = [
            Contestant(engine, variant, weights)
            for engine in engines
            for variant, all_weights in ENGINES[engine].items()
            for weights in all_weights
            if weights in arguments.weights and ("bf16" not in variant or BF16_FLAG in cpu_flags())
        ]
        compare(run, shape, contestants, selected)
        floors(run, shape)
    print(run.path.with_suffix(".md").read_text(encoding="utf-8") if report(run) else run.path)


def cases() -> dict[str, list[int]]:
    """The length of each request, by the name of the case, few tokens first."""
    found = {f"b{batch}-s{sequence}": [sequence] * batch for batch in (1, 8) for sequence in SEQUENCES}
    found[MIXED] = np.random.default_rng(0).integers(8, 257, 32).tolist()
    try:
        lengths = text_lengths()
        found |= {f"{TEXTS}-b{count}": lengths[:count] for count in (1, len(lengths))}
    except LookupError as error:
        print(f"no whole requests: {error}", file=sys.stderr)
    return dict(sorted(found.items(), key=lambda item: sum(item[1])))


def start(arguments: argparse.Namespace) -> Run:
    """Take up the results of an earlier run, as far as they are those of the same Whet."""
    results = arguments.work if arguments.quick else HERE / "results"
    for folder in (arguments.work / "models", arguments.work / "logs", results):
        folder.mkdir(parents=True, exist_ok=True)
    cpu = re.sub(r"\W+", "-", cpu_model()).strip("-").lower()
    path = results / f"comparison-{cpu}-{host_isa().name}-{arguments.threads}-threads.json"
    document: dict[str, Any] = {}
    if path.exists() and not arguments.fresh:
        document = json.loads(path.read_text(encoding="utf-8"))
    if (document.get("whet"), document.get("clock", "wall")) != (fingerprint(), arguments.clock):
        document = {"whet": fingerprint(), "clock": arguments.clock, "versions": {}, "cells": {}, "floors": {}}
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    cpus = sorted(choose_cpus(arguments.threads))
    machine = {"cpu": cpu_model(), "isa": host_isa().name, "kernel": platform.release()}
    document |= {"command": command, "machine": machine, "threads": arguments.threads}
    return Run(arguments.work.resolve(), arguments.threads, arguments.rounds, arguments.clock, path, document, cpus)


def fingerprint() -> str:
    """Tell one Whet from another: a hash of all its sources."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((HERE.parent / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compare(run: Run, shape: str, contestants: Sequence[Contestant], lengths: Mapping[str, list[int]]) -> None:
    """Measure the cases of one shape that have no complete result yet."""
    cells: dict[str, dict[str, Any]] = run.document["cells"].setdefault(shape, {})
    workers: dict[Contestant, Worker] = {}
    run.failures.clear()
    try:
        for case in lengths:
            entered = [c for c in contestants if takes_part(c, case)]
            if all(str(c) in cells.get(case, {}) for c in entered):
                continue
            for contestant in entered:
                if contestant not in workers and contestant not in run.failures:
                    with noted(run.failures, contestant):
                        workers[contestant] = open_worker(run, shape, contestant)
                        run.document["versions"][contestant.engine] = workers[contestant].version
            print(f"{shape} {case}", file=sys.stderr)
            present = {c: workers[c] for c in entered if c in workers and c not in run.failures}
            results = measure(run, present, case, lengths[case])
            cells[case] = {str(c): {"error": run.failures[c]} for c in entered if c in run.failures} | results
            give_up(run, present, case, results)
            run.save()
    finally:
        for worker in workers.values():
            worker.close()


def takes_part(contestant: Contestant, case: str) -> bool:
    """Who is in which case.

    Whole requests are Whet's alone: with tokenising, and for comparison the same lengths without. Mixed lengths leave
    out some weights: engines that keep a copy of them per shape want much memory there.
    """
    if case.startswith(TEXTS):
        return contestant.engine == "whet" and contestant.weights in ENGINES["whet"]["encode"]
    if case == MIXED and contestant.weights not in MIXED_WEIGHTS:
        return False
    return contestant.variant != "encode"


def open_worker(run: Run, shape: str, contestant: Contestant) -> Worker:
    """Make the environment, the model and the process. Raises Unavailable, Failed or what the model lacks."""
    engine = contestant.engine
    folder = run.work / "models" / shape / contestant.weights.replace("% ", "-")
    own = contestant.variant if engine == "whet" else None
    prepare(folder, shape, WEIGHTS[contestant.weights], own, run.document["whet"])
    if engine in EXPORTERS:
        name, file = EXPORTERS[engine]
        if not (folder / file).exists():
            command = [str(environment(run, name)), "-m", f"peers.{name}", str(folder)]
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    log = run.work / "logs" / f"{shape} {contestant}.log"
    return Worker(environment(run, engine), engine, folder, contestant.variant, run.threads, run.cpus, log)


def environment(run: Run, name: str) -> Path:
    """The Python of an engine; Whet's is the running one. Raises Unavailable."""
    if name not in run.pythons:
        try:
            run.pythons[name] = Path(sys.executable) if name == "whet" else make_environment(name, run.work / "envs")
        except Unavailable as error:
            run.pythons[name] = error  # other variants need not try
    found = run.pythons[name]
    if isinstance(found, Unavailable):
        raise found
    return found


def give_up(run: Run, workers: Mapping[Contestant, Worker], case: str, results: Mapping[str, Any]) -> None:
    """Leave out of the cases to come, which have more tokens, who died in this one or was hopelessly slow."""
    for contestant, worker in workers.items():
        result = results[str(contestant)]
        if "error" in result and not worker.alive:
            run.failures[contestant] = f"{case}: {result['error']}"
        elif "ms" in result and result["ms"][0] > HOPELESS_SECONDS * 1e3:
            run.failures[contestant] = f"not tried: {case} took {result['ms'][0] / 1e3:.0f} s"


@contextmanager
def noted(failures: dict[Contestant, str], contestant: Contestant) -> Iterator[None]:
    """Turn what goes wrong with one contestant into its result."""
    try:
        yield
    except (Failed, Unavailable, LookupError, ValueError, OSError) as error:
        failures[contestant] = str(error)
        print(f"  {contestant}: {error}", file=sys.stderr)


def measure(run: Run, workers: Mapping[Contestant, Worker], case: str, lengths: Sequence[int]) -> dict[str, Any]:
    """All rounds of one case: milliseconds of the median pass of each burst, and how outputs agree."""
    found: dict[Contestant, dict[str, Any]] = {}
    failed: dict[Contestant, str] = {}
    passes: dict[Contestant, int] = {}
    slow: set[Contestant] = set()
    outputs: dict[Contestant, Path] = {}
    for contestant, worker in workers.items():
        with noted(failed, contestant):
            outputs[contestant] = run.work / f"output-{len(outputs)}.npy"
            strategy, seconds = best_strategy(contestant, worker, lengths, outputs[contestant])
            found[contestant] = {"strategy": strategy, "ms": []}
            if seconds > HOPELESS_SECONDS:
                found[contestant]["ms"] = [seconds * 1e3]
            else:
                passes[contestant] = max(1, round(BURST_SECONDS / seconds))
                if seconds > SLOW_SECONDS:
                    slow.add(contestant)
    order = list(passes)
    for turn in range(run.rounds):
        for contestant in order[turn % len(order) :] + order[: turn % len(order)]:
            if contestant in failed or (contestant in slow and turn >= SLOW_ROUNDS):
                continue
            with noted(failed, contestant):
                message = {"do": "burst", "runs": passes[contestant], "settle": contestant not in slow}
                seconds = workers[contestant].ask(**message, clock=run.clock)["seconds"]
                found[contestant]["ms"].append(float(np.median(seconds)) * 1e3)
    for contestant, worker in workers.items():
        if worker.alive:
            with noted(failed, contestant):
                worker.ask(do="close")
    for contestant, result in found.items():
        result["cosine"] = agreement(contestant, outputs, lengths)
    return {str(c): {"error": failed[c]} if c in failed else found[c] for c in workers}


def best_strategy(contestant: Contestant, worker: Worker, lengths: Sequence[int], output: Path) -> tuple[str, float]:
    """Open the case the way that the engine does it fastest; the seconds of a pass."""

    def attempt(plan: list[list[int]]) -> float:
        return float(worker.ask(do="open", requests=list(lengths), plan=plan, output=str(output))["seconds"])

    plans = strategies(contestant, lengths)
    seconds: dict[str, float] = {}
    for name, plan in plans.items():
        seconds[name] = attempt(plan)
        if seconds[name] > HOPELESS_SECONDS:
            break
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[best] if len(seconds) == 1 else attempt(plans[best])


def strategies(contestant: Contestant, lengths: Sequence[int]) -> dict[str, list[list[int]]]:
    """Ways to make padded batches of requests; Whet packs tokens itself."""
    every = list(range(len(lengths)))
    plans = {"one batch": [every]}
    if contestant.engine != "whet" and len(set(lengths)) > 1:
        ascending = sorted(every, key=lengths.__getitem__)
        sizes = (8, 4, 1) if contestant.engine in ANY_SHAPE else (8,)
        plans |= {f"sorted, by {n}": [ascending[i : i + n] for i in range(0, len(every), n)] for n in sizes}
    return plans


def agreement(contestant: Contestant, outputs: Mapping[Contestant, Path], lengths: Sequence[int]) -> float | None:
    """Mean cosine with the output of Whet's int8 (for that: of fp32) from the same weights."""
    own = Contestant("whet", "int8", contestant.weights)
    other = Contestant("whet", "fp32", contestant.weights) if contestant == own else own
    if other not in outputs or not outputs[other].exists() or not outputs[contestant].exists():
        return None
    a, b = (np.load(outputs[c]).astype(np.float64) for c in (contestant, other))
    if a.shape != b.shape and len(a) == len(lengths):  # the first token of each request alone
        b = b[np.cumsum([0, *lengths[:-1]])]
    if a.shape != b.shape:
        return None
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).mean())
    return cosine if math.isfinite(cosine) else None


def floors(run: Run, shape: str) -> None:
    """Each op's share of the time and its distance from its floor."""
    found: dict[str, Any] = run.document["floors"].setdefault(shape, {})
    for weights in FLOORS["weights"]:
        folder = run.work / "models" / shape / str(weights).replace("% ", "-")
        missing = [s for s in FLOORS["sequences"] if f"{weights}, {s}" not in found]
        if not missing or not folder.exists():
            continue
        print(f"{shape} {weights}: floors", file=sys.stderr)
        command = [sys.executable, str(HERE / "floors.py"), str(folder), str(run.cpus[0]), *map(str, missing)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"floors.py ended with {done.returncode}", file=sys.stderr)
            continue
        found |= {f"{weights}, {s}": ops for s, ops in json.loads(done.stdout).items()}
    run.save()


def report(run: Run) -> bool:
    """Write the table and the picture; False if that can't be done."""
    try:
        python = environment(run, "report")
    except Unavailable as error:
        print(f"no report: {error}", file=sys.stderr)
        return False
    return subprocess.run([str(python), str(HERE / "report.py"), str(run.path)], check=False).returncode == 0


if __name__ == "__main__":
    main()
