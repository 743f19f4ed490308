"""``whet freeze``: fit caches after a model's layers, at which requests may leave early."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.caching.cache import Cache
from whet.caching.choose import NEVER, Choice, Costs, choose
from whet.caching.file import Freeze, FreezeError, load, save
from whet.caching.learn import fit_predictor, softmax
from whet.compiler import Precision, Text, check_can_freeze, compile, import_model
from whet.datasets import LabelledText
from whet.evaluate import class_of
from whet.frontend.model import Model
from whet.passes.dialect import EMBED, shape_of
from whet.passes.graph import Graph, digest_of, is_call
from whet.progress import Progress, Silent
from whet.runtime import Session
from whet.runtime import load as load_module

HELD_OUT = 5
"""One request in so many is held out for choosing, where no other data is given."""

_LEAST = 100
"""Requests, to fit on and to choose on."""
_TIMED = 64
"""Requests whose time is taken, one by one."""


@dataclass(frozen=True)
class FreezeReport:
    """What a freeze file does, measured on the requests that were held out."""

    model: str
    precision: str
    leave: tuple[float, ...]
    """Share of requests that leave after each layer; the last entry runs to the end."""
    thresholds: tuple[float | None, ...]
    """Of the cache after each layer but the last; None where there is none."""
    cache_accuracy: tuple[float, ...]
    """Accuracy of the cache that each layer could have, over all requests."""
    accuracy: float
    plain_accuracy: float
    """Of the model itself; 1 where there are no labels and its answers are the truth."""
    layer_microseconds: float
    cache_microseconds: float
    speedup: float
    """Expected, of single requests."""
    requests: tuple[int, int]
    """Number that the caches were fitted to, and that they were chosen on."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.precision}: {self.requests[1]} requests held out of {sum(self.requests)}"]
        for i, share in enumerate(self.leave, 1):
            if i == len(self.leave):
                lines.append(f"  layer {i}: {share:6.1%} run to the end")
            elif (threshold := self.thresholds[i - 1]) is not None:
                lines.append(f"  layer {i}: {share:6.1%} leave, with a probability of at least {threshold:.3f}")
            else:
                lines.append(f"  layer {i}: no cache")
        effective = sum(i * share for i, share in enumerate(self.leave, 1))
        lines.append(
            f"accuracy {self.accuracy:.4f} against {self.plain_accuracy:.4f}; {effective:.2f} of {len(self.leave)} "
            f"layers on average; a layer takes {self.layer_microseconds:.0f} µs, a cache "
            f"{self.cache_microseconds:.0f}: expected {self.speedup:.2f} times as fast"
        )
        return "\n".join(lines)


def fit(
    source: str | PathLike[str] | object,
    output: str | PathLike[str],
    data: Sequence[LabelledText | Text],
    held_out: Sequence[LabelledText | Text] | None = None,
    *,
    precision: Precision = "int8",
    budget: float = 0.005,
    progress: Progress | None = None,
    **options: Any,
) -> FreezeReport:
    """Fit caches for a model and write them to a file for ``whet.compile(…, freeze=…)``.

    Caches are learned (GATI, arXiv 2101.07344): after a layer, a linear predictor of the model's answer from the mean
    of the hidden state, distilled from the model's probabilities and, where they are known, the labels. Which layers
    get one and whom it trusts is chosen on held-out requests, for the least expected time of a single request on this
    machine within the accuracy budget.

    Args:
        source: as of ``whet.compile``; a classifier.
        output: the file to write.
        data: labelled texts, or texts, whose right answers are then the model's own.
        held_out: the same, to choose on; default: a fifth of ``data``. Take requests that the model was not trained on.
        precision: that the model will be compiled with.
        budget: most accuracy to lose, as a share of all requests.
        progress: told of every phase.
        options: ``task``, ``tokenizer``, ``calibration``, ``quantisation``, ``isa``, … of ``whet.compile``.

    Raises:
        ValueError: the model is no classifier, there is too little data, or a label is unknown.

    """
    if not 0 <= budget < 1:
        raise ValueError(f"budget is {budget}; expected a share of requests, at least 0 and below 1")
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or name another output")
    progress = progress or Silent()
    model = import_model(source, **{k: v for k, v in options.items() if k in ("task", "pooling", "tokenizer")})
    check_can_freeze(model)
    if held_out is None:
        chosen = np.random.default_rng(0).permutation(len(data)) % HELD_OUT == 0
        held_out = [row for row, out in zip(data, chosen, strict=True) if out]
        data = [row for row, out in zip(data, chosen, strict=True) if not out]
    for what, rows in (("fit", data), ("choose", held_out)):
        if len(rows) < _LEAST:
            raise ValueError(f"there are {len(rows)} requests to {what} on; expected at least {_LEAST}")

    with tempfile.TemporaryDirectory(prefix="whet-freeze-") as folder:
        probe = _compiled(Path(folder) / "probe.so", source, precision, progress, probe=True, **options)
        with progress.phase("run the model"):
            fitted, chosen_on = (_observe(probe, rows, *_sizes(model)) for rows in (data, held_out))
        layers = len(fitted.means) + 1
        with progress.phase("fit caches", layers - 1) as advance:
            predictors = []
            for i, means in enumerate(fitted.means, 1):
                predictors.append(fit_predictor(means, fitted.targets))
                advance(i)
        answers = [softmax(m @ w.T + b) for m, (w, b) in zip(chosen_on.means, predictors, strict=True)]
        right = np.array([a.argmax(axis=1) == chosen_on.labels for a in answers])
        plain = chosen_on.logits.argmax(axis=1) == chosen_on.labels
        everywhere = tuple(Cache(i, w, b, 2.0) for i, (w, b) in enumerate(predictors, 1))
        identity = (model.name, digest_of(model.module), precision)
        save(Freeze(*identity, everywhere, {}), Path(folder) / "all.freeze")
        quiet = _compiled(Path(folder) / "plain.so", source, precision, progress, **options)
        asked = _compiled(
            Path(folder) / "all.so", source, precision, progress, freeze=Path(folder) / "all.freeze", **options
        )
        with progress.phase("take times"):
            costs = _costs(quiet, asked, [_text(row) for row in held_out[:_TIMED]], layers)
    with progress.phase("choose layers and thresholds"):
        choice = choose(np.array([a.max(axis=1) for a in answers]), right, plain, costs, budget)
    caches = tuple(
        Cache(i, w, b, t)
        for i, ((w, b), t) in enumerate(zip(predictors, choice.thresholds, strict=True), 1)
        if t < NEVER
    )
    report = _report(identity, choice, costs, right, (len(data), len(held_out)))
    save(Freeze(*identity, caches, asdict(report)), output)
    return report


def inspect(path: str | PathLike[str]) -> FreezeReport:
    """What was fitted, out of a freeze file. Raises FreezeError where it is damaged."""
    fitted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in load(path).fitted.items()}
    try:
        return FreezeReport(**fitted)
    except TypeError as error:
        raise FreezeError(f"{path} holds no report ({error}); fit it again: whet freeze fit") from error


@dataclass(frozen=True)
class _Observed:
    """What the probe says of requests."""

    means: list[NDArray[np.float32]]
    """After each layer but the last, ``(requests, channels)``."""
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32]
    """Probabilities that a cache should give: the model's, halfway to the label where that is known."""


def _compiled(path: Path, source: Any, precision: Precision, progress: Progress, **options: Any) -> Session:
    compile(source, fspath(path), precision, progress=progress, **options)
    return load_module(path, threads=1)


def _sizes(model: Model) -> tuple[int, int]:
    """Labels, and channels of the hidden state."""
    embeddings = [b.var for b in Graph(model.module).bindings if is_call(b.value, EMBED)]
    return int(shape_of(model.module["main"].body)[1]), int(shape_of(embeddings[0])[1])


def _text(row: LabelledText | Text) -> Text:
    return row.text if isinstance(row, LabelledText) else row


def _observe(probe: Session, rows: Sequence[LabelledText | Text], classes: int, channels: int) -> _Observed:
    shown = probe.logits([_text(row) for row in rows])
    states, logits = shown[:, :-classes], shown[:, -classes:]
    probabilities = softmax(logits)
    labels = logits.argmax(axis=1)
    targets = probabilities
    known = [row.label for row in rows if isinstance(row, LabelledText)]
    if known:
        if len(known) < len(rows):
            raise ValueError(f"{len(known)} of {len(rows)} requests have labels; expected all or none")
        labels = np.array([class_of(label, probe.metadata.labels, classes) for label in known])
        targets = (probabilities + np.eye(classes, dtype=np.float32)[labels]) / 2
    return _Observed(np.split(states, states.shape[1] // channels, axis=1), logits, labels, targets)


def _costs(plain: Session, asked: Session, texts: Sequence[Text], layers: int) -> Costs:
    """Microseconds of a layer and of a cache, of single requests: medians of the two modules run in turns."""
    times: dict[Session, list[float]] = {plain: [], asked: []}
    for text in texts:
        for session, taken in times.items():
            best = []
            for _ in range(5):
                start = time.perf_counter()
                session.logits([text])
                best.append(time.perf_counter() - start)
            taken.append(min(best))
    without, with_caches = (1e6 * float(np.mean(times[s])) for s in (plain, asked))
    return Costs(without / layers, max(0.0, with_caches - without) / (layers - 1))


def _report(
    identity: tuple[str, str, str], choice: Choice, costs: Costs, right: NDArray[np.bool_], requests: tuple[int, int]
) -> FreezeReport:
    return FreezeReport(
        model=identity[0],
        precision=identity[2],
        leave=choice.leave,
        thresholds=tuple(t if t < NEVER else None for t in choice.thresholds),
        cache_accuracy=tuple(right.mean(axis=1).tolist()),
        accuracy=choice.accuracy,
        plain_accuracy=choice.plain_accuracy,
        layer_microseconds=costs.layer,
        cache_microseconds=costs.cache,
        speedup=choice.plain_cost / choice.cost,
        requests=requests,
    )
