"""``whet freeze``: fit caches after a model's layers, at which requests may leave early."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from whet.caching.cache import Cache, look_up
from whet.caching.choose import NEVER, Costs, choose, judge
from whet.caching.cluster import fit_clusters
from whet.caching.file import Freeze, FreezeError, load, save
from whet.caching.learn import fit_perceptron, softmax
from whet.caching.posterior import fit_posterior, fit_weights
from whet.compiler import Precision, Text, check_can_freeze, compile, import_model
from whet.datasets import LabelledText
from whet.frontend.model import Model
from whet.metrics import class_of
from whet.passes.dialect import EMBED, shape_of
from whet.passes.graph import Graph, digest_of, is_call
from whet.progress import Progress, Silent
from whet.runtime import Session
from whet.runtime import load as load_module
from whet.runtime.audit import Request, audited_requests, expected_loss
from whet.timing import least_times

Kind: TypeAlias = Literal["learned", "knn"]

HELD_OUT = 5
"""One request in so many is held out for choosing, where no other data is given."""

_LEAST = 100
"""Requests, to fit on and to choose on."""
_TIMED = 64
"""Requests whose time is taken, one by one, and runs of each, of which the fastest counts."""
_THINNED = 2
"""Copies of each request that learned caches are fitted to, each with some of its tokens left out. Of requests that it
was trained on a model's hidden states tell more than of those to come; of these copies they do not."""
_LEFT_OUT = (0.1, 0.3)
"""Share of the tokens of such a copy, drawn evenly between."""
_UNLIKE = 0.1
"""Share of what learned caches are fitted to that is requests of no class, where there are any."""
_LEAST_SURE = 0.01
"""By which logits are multiplied: a cache that tells nothing stays one that is not sure."""
_AT_ONCE = 512
"""Requests that are run between two signs of progress."""
_LEAST_PROBABILITY = 1e-4
"""Of an answer of a cluster, before its logarithm is taken."""


@dataclass(frozen=True)
class FreezeReport:
    """What a freeze file does, measured on the requests that were held out."""

    model: str
    precision: str
    kind: str
    leave: tuple[float, ...]
    """Share of requests that leave after 0, 1, 2, … layers; the last entry runs to the end."""
    thresholds: tuple[float | None, ...]
    """Of the cache after 0, 1, 2, … layers; None where there is none."""
    sizes: tuple[int, ...]
    """Bytes of each of these caches; 0 where there is none."""
    cache_accuracy: tuple[float, ...]
    """Accuracy of the cache that each place could have, over all requests."""
    accuracy: float
    plain_accuracy: float
    """Of the model itself; 1 where there are no labels and its answers are the truth."""
    fixed_microseconds: float
    """What every request takes: tokenising, embedding."""
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
        lines = [
            f"{self.model}, {self.precision}, {self.kind} caches of {sum(self.sizes) / 1e3:.0f} kB: "
            f"{self.requests[1]} requests held out of {sum(self.requests)}"
        ]
        for i, share in enumerate(self.leave):
            where = f"  after {i} layer{'s' * (i != 1)}: "
            if i == len(self.leave) - 1:
                lines.append(f"{where}{share:6.1%}, the end")
            elif (threshold := self.thresholds[i]) is not None:
                lines.append(f"{where}{share:6.1%}, trusted by {threshold:.3f} or more")
            else:
                lines.append(f"{where}no cache")
        effective = sum(i * share for i, share in enumerate(self.leave))
        lines.append(
            f"accuracy {self.accuracy:.4f} against {self.plain_accuracy:.4f}; {effective:.2f} of {len(self.leave) - 1} "
            f"layers on average; a layer takes {self.layer_microseconds:.0f} µs, a cache "
            f"{self.cache_microseconds:.1f}, all else {self.fixed_microseconds:.0f}: expected {self.speedup:.2f} times "
            "as fast"
        )
        return "\n".join(lines)


def fit(
    source: str | PathLike[str] | object,
    output: str | PathLike[str],
    data: Sequence[LabelledText | Text],
    held_out: Sequence[LabelledText | Text] | None = None,
    *,
    kind: Kind = "learned",
    precision: Precision = "int8",
    budget: float = 0.005,
    served: str | PathLike[str] | None = None,
    unlike: Sequence[Text] = (),
    progress: Progress | None = None,
    **options: Any,
) -> FreezeReport:
    """Fit caches for a model and write them to a file for ``whet.compile(…, freeze=…)``.

    A cache looks at the mean of a request's hidden state, behind the embeddings or behind a layer. Learned ones (GATI,
    arXiv 2101.07344) are perceptrons with the model's answer, distilled from its probabilities and, where they are
    known, the labels, and trusted by how far the largest probability is above the next, at the temperature that fits
    the held-out labels best. Those of nearest neighbours (Freeze Inference, arXiv 2002.02645) answer as the nearest of
    many centroids does, and are trusted by the distance to it.
    Which places get a cache and whom it trusts is chosen on held-out requests, for the least expected time of a single
    request on this machine within the accuracy budget.

    Args:
        source: as of ``whet.compile``; a classifier.
        output: the file to write.
        data: labelled texts, or texts, whose right answers are then the model's own.
        held_out: the same, to choose on; default: a fifth of ``data``. Take requests that the model was not trained on.
        kind: of the caches, ``"learned"`` or ``"knn"``.
        precision: that the model will be compiled with.
        budget: most accuracy to lose, as a share of all requests.
        served: a file of audits. Of its requests half count as data and the others are those to choose on, in place of
            ``held_out``, with the model's own answers as the truth: so caches follow what a module is asked.
        unlike: texts that belong to no class. Learned caches are taught to be sure of nothing there (outlier exposure,
            Hendrycks et al. 2019, arXiv 1812.04606).
        progress: told of every phase.
        options: ``task``, ``tokenizer``, ``calibration``, ``quantisation``, ``isa``, … of ``whet.compile``.

    Raises:
        ValueError: the model is no classifier, there is too little data, or a label is unknown.

    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if not 0 <= budget < 1:
        raise ValueError(f"budget is {budget}; expected a share of requests, at least 0 and below 1")
    if unlike and kind != "learned":
        raise ValueError(f"kind is {kind!r}, and unlike is for learned caches alone; leave one out")
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or name another output")
    progress = progress or Silent()
    model = import_model(source, **{k: v for k, v in options.items() if k in ("task", "pooling", "tokenizer")})
    check_can_freeze(model)
    data, held_out, asked = _divided(data, held_out, served)
    sizes = _sizes(model)
    known = [_known(rows, model.labels, sizes[0]) for rows in (data, held_out)]

    with tempfile.TemporaryDirectory(prefix="whet-freeze-") as folder:
        probe = _compiled(Path(folder) / "probe.so", source, precision, progress, probe=True, **options)
        copies = _THINNED if kind == "learned" else 0
        seen = _observe(probe, data, known[0], asked[::2], *sizes, copies, progress)
        chosen_on = _observe(probe, held_out, known[1], asked[1::2], *sizes, 0, progress)
        if unlike:
            seen = _with_unlike(seen, _observe(probe, unlike, [], [], *sizes, copies, progress))
        layers = len(seen.means)
        with progress.phase("fit caches", layers) as advance:
            caches = []
            for i, means in enumerate(seen.means):
                caches.append(_fit_cache(i, kind, means, seen, chosen_on))
                advance(i + 1)
        found = [look_up(m, *c.arrays, kind=c.kind) for m, c in zip(chosen_on.means, caches, strict=True)]
        answers, trust = (np.array(part) for part in zip(*found, strict=True))
        loss = _losses(answers, chosen_on)
        right, plain = (logits.argmax(axis=-1) == chosen_on.labels for logits in (answers, chosen_on.logits))
        identity = (model.name, digest_of(model.module), precision, layers)
        save(Freeze(*identity, 0.0, 0.0, (), tuple(caches), {}), Path(folder) / "all.freeze")
        quiet = _compiled(Path(folder) / "plain.so", source, precision, progress, **options)
        looked_up = _compiled(
            Path(folder) / "all.so", source, precision, progress, freeze=Path(folder) / "all.freeze", **options
        )
        with progress.phase("take times"):
            costs = _costs(quiet, looked_up, [_text(row) for row in (held_out or data)[:_TIMED]], layers)
    with progress.phase("choose places and thresholds"):
        choice = choose(trust, loss, costs, budget)
    kept = [replace(c, threshold=t) for c, t in zip(caches, choice.thresholds, strict=True) if t < NEVER]
    report = FreezeReport(
        model=model.name,
        precision=precision,
        kind=kind,
        leave=choice.leave,
        thresholds=tuple(t if t < NEVER else None for t in choice.thresholds),
        sizes=tuple(c.size if t < NEVER else 0 for c, t in zip(caches, choice.thresholds, strict=True)),
        cache_accuracy=tuple(right.mean(axis=1).tolist()),
        accuracy=float(plain.mean()) - choice.loss,
        plain_accuracy=float(plain.mean()),
        fixed_microseconds=costs.fixed,
        layer_microseconds=costs.layer,
        cache_microseconds=costs.cache,
        speedup=choice.plain_cost / choice.cost,
        requests=(len(data) + len(asked[::2]), len(chosen_on.labels)),
    )
    expected = np.array(
        [
            [expected_loss(*row) for row in zip(classes, chosen_on.logits, strict=True)]
            for classes in answers.argmax(axis=2)
        ]
    )
    allowed = judge(np.array(choice.thresholds), trust, expected, costs).loss + budget
    leave = *(choice.leave[cache.layer] for cache in kept), choice.leave[-1]
    save(Freeze(*identity, allowed, budget, leave, tuple(kept), asdict(report)), output)
    return report


def _divided(
    data: Sequence[LabelledText | Text],
    held_out: Sequence[LabelledText | Text] | None,
    served: str | PathLike[str] | None,
) -> tuple[Sequence[LabelledText | Text], Sequence[LabelledText | Text], list[Request]]:
    """What to fit to, what to choose on, and the served requests: half of them for either, in turns."""
    asked = [] if served is None else audited_requests(served)
    if served is not None and held_out is not None:
        raise ValueError("both held_out and served say what to choose on; leave one out")
    if served is None and held_out is None:
        chosen = np.random.default_rng(0).permutation(len(data)) % HELD_OUT == 0
        held_out = [row for row, out in zip(data, chosen, strict=True) if out]
        data = [row for row, out in zip(data, chosen, strict=True) if not out]
    held_out = held_out or []
    for what, count in (("fit", len(data)), ("choose", len(held_out) + len(asked[1::2]))):
        if count < _LEAST:
            raise ValueError(f"there are {count} requests to {what} on; expected at least {_LEAST}")
    return data, held_out, asked


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
    """Of the hidden state after 0, 1, 2, … layers, each ``(requests, channels)``."""
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32]
    """Probabilities that a cache should give: the model's, halfway to the label where that is known."""


def _with_unlike(seen: _Observed, unlike: _Observed) -> _Observed:
    """And requests of no class, drawn to be their share of all, of which nothing shall be sure."""
    requests, classes = seen.targets.shape
    drawn = np.random.default_rng(0).integers(len(unlike.labels), size=round(requests * _UNLIKE / (1 - _UNLIKE)))
    return _Observed(
        [np.concatenate([some, more[drawn]]) for some, more in zip(seen.means, unlike.means, strict=True)],
        np.concatenate([seen.logits, unlike.logits[drawn]]),
        np.concatenate([seen.labels, unlike.labels[drawn]]),
        np.concatenate([seen.targets, np.full((len(drawn), classes), 1 / classes, np.float32)]),
    )


def _fit_cache(layer: int, kind: Kind, means: NDArray[np.float32], seen: _Observed, chosen_on: _Observed) -> Cache:
    if kind == "knn":
        logs = np.log(np.maximum(seen.targets, _LEAST_PROBABILITY)).astype(np.float32)
        return Cache(layer, "clusters", fit_clusters(means, logs, seen.labels), NEVER)
    *arrays, scale, bias = fit_perceptron(means, seen.targets)
    logits, _ = look_up(chosen_on.means[layer], *arrays, scale, bias, kind="perceptron")
    sharper = np.float32(fit_weights([logits], chosen_on.labels).item())
    sharper = max(sharper, np.float32(_LEAST_SURE))
    return Cache(layer, "perceptron", (*arrays, scale * sharper, bias * sharper), NEVER)


def _losses(answers: NDArray[np.float32], on: _Observed) -> NDArray[np.float64]:
    """What is lost if a cache answers in place of the model, ``(caches, requests)``.

    That is the difference of the probabilities that the two are right, after the model and all caches were asked.
    """
    right = fit_posterior([on.logits, answers.mean(axis=0)], on.labels)
    requests = np.arange(len(right))
    return np.array(right[requests, on.logits.argmax(axis=1)] - right[requests, answers.argmax(axis=2)])


def _compiled(path: Path, source: Any, precision: Precision, progress: Progress, **options: Any) -> Session:
    compile(source, fspath(path), precision, progress=progress, **options)
    return load_module(path, threads=1)


def _sizes(model: Model) -> tuple[int, int]:
    """Labels, and channels of the hidden state."""
    embeddings = [b.var for b in Graph(model.module).bindings if is_call(b.value, EMBED)]
    return int(shape_of(model.module["main"].body)[1]), int(shape_of(embeddings[0])[1])


def _text(row: LabelledText | Text) -> Text:
    return row.text if isinstance(row, LabelledText) else row


def _known(rows: Sequence[LabelledText | Text], labels: Sequence[str], classes: int) -> list[int]:
    """The classes of rows that have labels; raises ValueError where only some have, or one is unknown."""
    given = [row.label for row in rows if isinstance(row, LabelledText)]
    if given and len(given) < len(rows):
        raise ValueError(f"{len(given)} of {len(rows)} requests have labels; expected all or none")
    return [class_of(label, labels, classes) for label in given]


def _requests(probe: Session, rows: Sequence[LabelledText | Text]) -> list[Request]:
    found = probe.requests([_text(row) for row in rows])
    return [Request(ids, np.arange(len(ids)), types) for ids, types in found]


def _thinned(request: Request, special: NDArray[Any], rng: np.random.Generator) -> Request:
    """The request without some of its tokens, those excepted that every request has; or whole, were nothing left."""
    kept = (rng.random(len(request.ids)) >= rng.uniform(*_LEFT_OUT)) | np.isin(request.ids, special)
    kept |= not kept.any()
    types = None if request.types is None else request.types[kept]
    return Request(request.ids[kept], np.arange(kept.sum()), types)


def _observe(
    probe: Session,
    rows: Sequence[LabelledText | Text],
    known: Sequence[int],
    served: Sequence[Request],
    classes: int,
    channels: int,
    copies: int,
    progress: Progress,
) -> _Observed:
    """Run rows of data, whose classes may be ``known``, and served requests, and thinned copies of all of them."""
    requests = [*_requests(probe, rows), *served]
    rng = np.random.default_rng(0)
    (special,) = _requests(probe, [""])
    requests += [_thinned(request, special.ids, rng) for request in requests * copies]
    parts = []
    with progress.phase("run the model", len(requests)) as advance:
        for start in range(0, len(requests), _AT_ONCE):
            chunk = requests[start : start + _AT_ONCE]
            ids, positions, types = (np.concatenate(part) for part in zip(*chunk, strict=True))
            parts.append(probe.run_packed(ids, [len(request.ids) for request in chunk], positions, types))
            advance(start + len(chunk))
    shown = np.concatenate(parts)
    states, logits = shown[:, :-classes], shown[:, -classes:]
    targets, right = softmax(logits), logits.argmax(axis=1)
    if known:  # of the copies nobody knows whether their labels still hold
        right[: len(known)] = known
        targets[: len(known)] = (targets[: len(known)] + np.eye(classes, dtype=np.float32)[known]) / 2
    return _Observed(np.split(states, states.shape[1] // channels, axis=1), logits, right, targets)


def _costs(plain: Session, asked: Session, texts: Sequence[Text], layers: int) -> Costs:
    """Microseconds of CPU of a request: in the plain module, and, in that with caches, of leaving first and never.

    Of CPU: how busy the machine is while caches are fitted must not decide what is chosen.
    """
    thresholds = asked.thresholds
    assert thresholds is not None

    def set_thresholds(first: float) -> None:
        thresholds[:] = NEVER
        thresholds[0] = first

    cases = [(plain, NEVER), (asked, NEVER), (asked, -NEVER)]
    times: list[list[float]] = [[] for _ in cases]
    for text in texts:
        for (session, first), taken in zip(cases, times, strict=True):
            set_thresholds(first)
            taken += least_times([partial(session.logits, [text])])
    without, never, at_once = 1e6 * np.array(times)
    cache = max(0.0, float(np.median(never - without)) / layers)
    fixed = max(0.0, float(np.median(at_once)) - cache)
    return Costs(fixed, max(0.0, float(np.median(without)) - fixed) / layers, cache)
