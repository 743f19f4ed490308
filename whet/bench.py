"""Times a compiled module over batch × sequence × threads, beside the same model in other engines.

Engines take turns in short blocks within one process, so that whatever else the machine does meets all alike; each
case runs on a thread of its own that is pinned to as many CPUs as it may use threads, which every engine's workers
inherit. Inputs are token ids: tokenisation is not part of the time, packing and unpacking are.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from whet.metrics import cosines
from whet.peers import Inputs, Missing, Peer, Run, make_peers
from whet.progress import Progress, Silent
from whet.runtime import Session, load
from whet.runtime.artifact import open_artifact
from whet.runtime.cpu import choose_variant, cpu_model
from whet.runtime.metadata import Metadata
from whet.runtime.threads import available_cpus

T = TypeVar("T")
Step: TypeAlias = Callable[[], object]

BLOCK_SECONDS = 0.05
"""How long an engine runs before the next one has its turn."""
SETTLE_SECONDS = 0.005
"""Runs at the start of a turn that are not timed: caches fill, and the other engine's workers stop spinning."""
LEAST_RUNS = 10
"""Timed runs of each engine, however long they take."""
WARM_UP_SECONDS = 0.3
BUSY = 0.3
"""Load per CPU from which the times are not Whet's alone."""
SAME = 0.75
"""Cosine that even coarse int8 keeps on random tokens."""
SEQUENCES = (16, 32, 128)
"""Tokens per request, where the caller has no wishes: a query, a sentence, a paragraph."""


@dataclass(frozen=True)
class Timing:
    """One engine in one case."""

    batch: int
    sequence: int
    threads: int
    engine: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    ratio: float
    """Its median over Whet's: how many times longer it takes."""
    cosine: float
    """Mean cosine of its output rows with Whet's, on random tokens; NaN where the shapes differ."""


@dataclass(frozen=True)
class BenchReport:
    """All cases, and what they were measured on."""

    module: str
    name: str
    task: str
    precision: str
    isa: str
    zeros: float
    """Share of zeros among the integer weights of dense layers."""
    cpu: str
    cpus: int
    """CPUs this process may use."""
    load: float
    """Load average of the last minute before the first case: others were busy if it is not near 0."""
    versions: dict[str, str]
    timings: tuple[Timing, ...]
    missing: tuple[Missing, ...]

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(_finite(asdict(self)), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.module}: {self.name}, {self.task}, {self.precision} for {self.isa}, {self.zeros:.1%} zeros",
            f"{self.cpu}, {self.cpus} CPUs, load {self.load:.2f}; "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            f"{'batch':>5} {'sequence':>8} {'threads':>7}  {'engine':18} {'median ms':>10} {'p10 – p90':>17} "
            f"{'ratio':>7} {'cosine':>7}",
        ]
        case = None
        for t in self.timings:
            same, case = case == (t.batch, t.sequence, t.threads), (t.batch, t.sequence, t.threads)
            head = " " * 22 if same else f"{t.batch:5} {t.sequence:8} {t.threads:7}"
            spread = f"{t.p10_ms:.3f} – {t.p90_ms:.3f}"
            line = f"{head}  {t.engine:18} {t.median_ms:10.3f} {spread:>17}"
            lines.append(line + (f" {t.ratio:6.2f}× {t.cosine:7.4f}" if same else ""))
        lines += [f"missing: {m.name}: {m.reason}" for m in self.missing]
        if any(not t.cosine >= SAME for t in self.timings):
            lines.append("note: a peer computes something else; was the module made of --model, unpruned?")
        if self.load > BUSY * self.cpus:
            lines.append("note: others keep this machine busy; the spread shows how much of that is in the medians")
        return "\n".join(lines)


def bench(
    module: str | PathLike[str],
    *,
    batches: Sequence[int] = (1,),
    sequences: Sequence[int] | None = None,
    threads: Sequence[int] = (1,),
    min_seconds: float = 1.0,
    against: Sequence[str] = (),
    source: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Time ``module``.

    Args:
        module: a compiled module.
        batches: requests per call.
        sequences: tokens per request; default 16, 32 and 128, as far as the module takes them.
        threads: threads per call, of Whet and of every peer.
        min_seconds: timed seconds of each engine in each case.
        against: engines of ``whet.peers.PEERS`` that run the same model in turns.
        source: the model that ``module`` was compiled from; the peers' weights.
        progress: told of every case.

    Raises:
        ValueError: a case that the module or the machine can't run, or no source to compare with.

    """
    metadata = choose_variant(open_artifact(module).variants)
    if sequences is None:
        sequences = [s for s in SEQUENCES if s <= metadata.max_length] or [metadata.max_length]
    _check(metadata, batches, sequences, threads, min_seconds, against, source)
    progress = progress or Silent()
    before = os.getloadavg()[0]
    timings: list[Timing] = []
    with TemporaryDirectory(prefix="whet-bench-") as folder:
        made: list[Peer | Missing] = []
        if against and source is not None:
            with progress.phase("prepare " + ", ".join(against)):
                made = make_peers(against, Path(source), Path(folder))
        peers = [p for p in made if isinstance(p, Peer)]
        missing = [p for p in made if isinstance(p, Missing)]
        shapes = [(b, s) for b in batches for s in sequences]
        for count in threads:
            measure = partial(_measure, module, peers, shapes, count, min_seconds, progress)
            found, failed = pinned(count, measure)
            timings += found
            missing += failed
    return BenchReport(
        module=str(module),
        name=metadata.name,
        task=metadata.task,
        precision=metadata.precision,
        isa=metadata.isa,
        zeros=zeros(metadata),
        cpu=cpu_model(),
        cpus=available_cpus(),
        load=before,
        versions={"whet": metadata.whet, **{p.name.split()[0]: p.version for p in peers}},
        timings=tuple(timings),
        missing=tuple(dict.fromkeys(missing)),
    )


def zeros(metadata: Metadata) -> float:
    """Share of zeros among the integer weights of dense layers, by the module's own report."""
    layers = [(r["zeros"], r["out_features"] * r["in_features"]) for r in metadata.report]
    return float(sum(z * n for z, n in layers) / max(1, sum(n for _, n in layers)))


def interleave(
    steps: Mapping[str, Step], min_seconds: float, stop: threading.Event | None = None
) -> dict[str, NDArray[np.float64]]:
    """Time each step until it has ``min_seconds`` and ``LEAST_RUNS``; they take turns in blocks.

    Returns:
        Seconds of every timed run, by name.

    """
    runs = {name: max(1, round(BLOCK_SECONDS / _warm_up(step))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    while any(sum(t) < min_seconds or len(t) < LEAST_RUNS for t in times.values()):
        for name in order:
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            _repeat(steps[name], SETTLE_SECONDS)
            for _ in range(runs[name]):
                start = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return {name: np.array(t) for name, t in times.items()}


def _warm_up(step: Step) -> float:
    """Seconds of a run once the first ones are over."""
    step()
    return _repeat(step, WARM_UP_SECONDS)


def _repeat(step: Step, seconds: float) -> float:
    """Run for so long, at least once; the mean of a run."""
    start, count = time.perf_counter(), 0
    while True:
        step()
        count += 1
        if (passed := time.perf_counter() - start) >= seconds:
            return passed / count


def _check(
    metadata: Metadata,
    batches: Sequence[int],
    sequences: Sequence[int],
    threads: Sequence[int],
    min_seconds: float,
    against: Sequence[str],
    source: str | PathLike[str] | None,
) -> None:
    for name, values, most, limit in (
        ("batch", batches, math.inf, ""),
        ("sequence", sequences, metadata.max_length, "the module's longest request"),
        ("threads", threads, available_cpus(), "the CPUs that this process may use"),
    ):
        if not values:
            raise ValueError(f"no {name} is given; expected at least one")
        for value in values:
            if not 1 <= value <= most:
                bound = f"1 to {most}, {limit}" if limit else "at least 1"
                raise ValueError(f"{name} is {value}; expected {bound}")
    if min_seconds <= 0:
        raise ValueError(f"min_seconds is {min_seconds}; expected more than 0")
    if against and source is None:
        raise ValueError("peers need the model that the module was compiled from; name it as the source (--model)")


def _measure(
    module: str | PathLike[str],
    peers: Sequence[Peer],
    shapes: Sequence[tuple[int, int]],
    threads: int,
    min_seconds: float,
    progress: Progress,
    stop: threading.Event,
) -> tuple[list[Timing], list[Missing]]:
    session = load(module, threads)
    runs: dict[str, Run] = {f"whet {session.metadata.precision}": _whet(session)}
    missing = []
    for peer in peers:
        try:
            runs[peer.name] = peer.open(threads)
        except Exception as error:
            missing.append(Missing(peer.name, _failure(error)))
    timings: list[Timing] = []
    for batch, sequence in shapes:
        inputs = random_inputs(session.metadata, batch, sequence)
        outputs: dict[str, NDArray[Any]] = {}
        for name, run in runs.items():
            try:
                outputs[name] = run(inputs)
            except Exception as error:
                if not outputs:
                    raise  # Whet itself
                missing.append(Missing(name, f"{batch} × {sequence}: {_failure(error)}"))
        steps = {name: partial(runs[name], inputs) for name in outputs}
        with progress.phase(f"batch {batch}, sequence {sequence}, threads {threads}"):
            times = interleave(steps, min_seconds, stop)
        timings += _timings((batch, sequence, threads), times, outputs)
    return timings, missing


def _whet(session: Session) -> Run:
    types = session.metadata.type_vocab_size > 1

    def run(inputs: Inputs) -> NDArray[Any]:
        return session.run(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"] if types else None)

    return run


def random_inputs(metadata: Metadata, batch: int, sequence: int) -> Inputs:
    """A full batch: int64 ``(batch, sequence)`` each of random ids, a mask of ones, and token types 0."""
    shape = (batch, sequence)
    return {
        "input_ids": np.random.default_rng(0).integers(0, metadata.vocab_size, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


def _timings(
    case: tuple[int, int, int], times: Mapping[str, NDArray[np.float64]], outputs: Mapping[str, NDArray[Any]]
) -> list[Timing]:
    own = next(iter(times))
    base = float(np.median(times[own]))
    timings = []
    for name, seconds in times.items():
        p10, median, p90 = (float(p) * 1e3 for p in np.percentile(seconds, [10, 50, 90]))
        cosine = _cosine(outputs[name], outputs[own])
        timings.append(Timing(*case, name, median, p10, p90, len(seconds), median / (base * 1e3), cosine))
    return timings


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.shape != b.shape:
        return math.nan
    return float(cosines(*(x.reshape(-1, x.shape[-1]) for x in (a, b))).mean())


def pinned(threads: int, work: Callable[[threading.Event], T]) -> T:
    """Run ``work`` on a new thread that may use ``threads`` CPUs, and so may every thread it starts."""
    stop, done = threading.Event(), threading.Event()
    result: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            os.sched_setaffinity(0, choose_cpus(threads))
            result.append(work(stop))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=body, name=f"whet-bench-{threads}")
    try:
        thread.start()
        # Not join: interrupted, it takes the thread for ended. In steps: a signal just before a wait does not end it.
        while not done.wait(0.1):
            pass
    except KeyboardInterrupt:
        stop.set()
        done.wait()
        raise
    finally:
        thread.join()
    if errors:
        raise errors[0]
    return result[0]


def choose_cpus(count: int, topology: Path = Path("/sys/devices/system/cpu")) -> set[int]:
    """Choose CPUs that this process may use; one of each core before a second of any."""
    seen: dict[str, int] = {}
    ranked = []
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            core = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        seen[core] = seen.get(core, 0) + 1
        ranked.append((seen[core], cpu))
    return {cpu for _, cpu in sorted(ranked)[:count]}


def _failure(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _finite(value: Any) -> Any:
    """NaN is no JSON: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
