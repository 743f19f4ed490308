"""What caches gain: a module compiled with them beside the same without, on real requests, one by one in turns.

Times are of single requests on one pinned thread, tokenising included: of some runs the least time that the thread had
the CPU, which is what a request takes where nobody else wants it. All else (where requests leave, what they are
answered) is of all requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.bench import pinned
from whet.datasets import LabelledText, Text
from whet.metrics import class_of
from whet.progress import Progress, Silent
from whet.runtime import Session, load
from whet.runtime.cpu import cpu_model
from whet.runtime.spans import softmax
from whet.timing import least_times

TIMED = 500
"""Requests that are timed, where the caller has no wishes."""
CONFIDENT = (0.5, 0.9)
"""Probabilities of the best class from which an application may act on it."""
_BATCH = 256


@dataclass(frozen=True)
class Latency:
    """Microseconds of CPU of single requests."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class ExitsReport:
    """The module with caches (``frozen``) and the one without (``plain``) on the same requests."""

    module: str
    plain_module: str
    cpu: str
    requests: int
    leave: dict[int, float]
    """Share of requests that were answered after so many layers; the last entry is all layers."""
    effective_layers: float
    timed: int
    frozen: Latency
    plain: Latency
    to_the_end: float
    """How much longer the timed requests take that run to the end, over the plain module: 1.02 is 2 %; NaN if none."""
    agreement: float
    """Share of requests whose class is the plain module's."""
    accuracy: tuple[float, float] | None
    """With caches, and plain; None without labels."""
    confident: dict[float, tuple[float, float]]
    """Share of requests whose class has this probability or a higher one: with caches, and plain."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        end = max(self.leave)
        shares = "  ".join(f"{layer}: {share:.1%}" for layer, share in self.leave.items())
        at_half = sum(share for layer, share in self.leave.items() if layer <= end / 2)
        lines = [
            f"{self.module} beside {self.plain_module}: {self.requests} requests, {self.timed} timed; {self.cpu}",
            f"answered after layer   {shares}",
            f"effective layers       {self.effective_layers:.2f} of {end}; {at_half:.1%} at half of them or fewer",
            f"{'µs per request':22} {'mean':>8} {'p50':>8} {'p95':>8} {'p99':>8}",
        ]
        for name, latency in (("plain", self.plain), ("with caches", self.frozen)):
            lines.append(f"  {name:20} " + " ".join(f"{value:8.0f}" for value in asdict(latency).values()))
        pairs = zip(asdict(self.plain).values(), asdict(self.frozen).values(), strict=True)
        lines.append(f"  {'times as fast':20} " + " ".join(f"{plain / frozen:8.2f}" for plain, frozen in pairs))
        if np.isfinite(self.to_the_end):
            lines.append(f"  {'those to the end take':20} {self.to_the_end:.3f} of the plain time")
        lines.append(f"same answer as plain   {self.agreement:.4f}")
        if self.accuracy is not None:
            lines.append(f"accuracy               {self.accuracy[0]:.4f}, plain {self.accuracy[1]:.4f}")
        for level, (frozen, plain) in self.confident.items():
            lines.append(f"probability >= {level:.2f}    {frozen:.1%}, plain {plain:.1%}")
        return "\n".join(lines)


def bench_exits(
    module: str | PathLike[str],
    plain: str | PathLike[str],
    data: Sequence[LabelledText | Text],
    *,
    timed: int = TIMED,
    progress: Progress | None = None,
) -> ExitsReport:
    """Compare a module with caches with the same model compiled without, on requests that neither has seen.

    Args:
        module: compiled with ``freeze=``.
        plain: compiled without, all else the same.
        data: texts or pairs, labelled or not.
        timed: requests to time, spread over the data; fewer if there are not so many.
        progress: told of both phases.

    Raises:
        ValueError: the first module has no caches, the second has, they are of different models, or a label is unknown.

    """
    progress = progress or Silent()
    frozen, other = load(module, threads=1), load(plain, threads=1)
    _check(frozen, other)
    texts = [row.text if isinstance(row, LabelledText) else row for row in data]
    if not texts:
        raise ValueError("there is no request to answer; expected at least one")
    with progress.phase("answer all requests", len(texts)) as advance:
        answers: dict[Session, list[NDArray[Any]]] = {frozen: [], other: []}
        layers = []
        for start in range(0, len(texts), _BATCH):
            part = texts[start : start + _BATCH]
            found = frozen.trace(part)
            answers[frozen].append(found.answers)
            layers.append(found.layers)
            answers[other].append(other.logits(part))
            advance(start + len(part))
    ours, theirs = (np.concatenate(parts) for parts in answers.values())
    left = np.concatenate(layers)
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(timed, len(texts))).astype(int))
    with progress.phase("take times", len(chosen)) as advance:

        def work(stop: threading.Event) -> NDArray[np.float64]:
            rows = []
            for i in chosen:
                if stop.is_set():
                    break
                rows.append(_times([frozen, other], texts[i]))
                advance(len(rows))
            return np.array(rows)

        times = pinned(1, work)
    end = frozen.metadata.exits[-1]
    stayed = left[chosen] == end
    return ExitsReport(
        module=str(frozen.path),
        plain_module=str(other.path),
        cpu=cpu_model(),
        requests=len(texts),
        leave={layer: float((left == layer).mean()) for layer in frozen.metadata.exits},
        effective_layers=float(left.mean()),
        timed=len(chosen),
        frozen=_latency(times[:, 0]),
        plain=_latency(times[:, 1]),
        to_the_end=float(times[stayed, 0].sum() / times[stayed, 1].sum()) if stayed.any() else float("nan"),
        **_quality(data, frozen, ours, theirs),
    )


def _check(frozen: Session, other: Session) -> None:
    if not frozen.metadata.exits:
        raise ValueError(f"{frozen.path} has no caches; compile the model with --freeze")
    if other.metadata.exits:
        raise ValueError(f"{other.path} has caches too; compile the model without --freeze to compare with")
    a, b = ((s.metadata.name, s.metadata.task, s.metadata.output.channels) for s in (frozen, other))
    if a != b:
        raise ValueError(f"{frozen.path} is {a}, {other.path} is {b}; expected the same model")


def _times(sessions: Sequence[Session], text: Text) -> list[float]:
    return [1e6 * seconds for seconds in least_times([partial(session.logits, [text]) for session in sessions])]


def _latency(times: NDArray[np.float64]) -> Latency:
    p50, p95, p99 = (float(p) for p in np.percentile(times, [50, 95, 99]))
    return Latency(float(times.mean()), p50, p95, p99)


def _quality(
    data: Sequence[LabelledText | Text], session: Session, ours: NDArray[Any], theirs: NDArray[Any]
) -> Mapping[str, Any]:
    """What the answers are worth, as fields of the report."""
    classes = [answers.argmax(axis=1) for answers in (ours, theirs)]
    best = [softmax(answers).max(axis=1) for answers in (ours, theirs)]
    labels = [row.label for row in data if isinstance(row, LabelledText)]
    accuracy = None
    if len(labels) == len(ours):
        right = np.array([class_of(label, session.metadata.labels, ours.shape[1]) for label in labels])
        accuracy = tuple(float((found == right).mean()) for found in classes)
    return {
        "agreement": float((classes[0] == classes[1]).mean()),
        "accuracy": accuracy,
        "confident": {level: tuple(float((p >= level).mean()) for p in best) for level in CONFIDENT},
    }
