"""``whet memo``: make a database of attention for a compiled module, look at it, and measure what it gains."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.answer_loss import losses
from whet.caching.word_key import fit_vectors, pairs_of
from whet.progress import Progress, Silent
from whet.runtime import Session, load
from whet.runtime.artifact import open_artifact
from whet.runtime.audit import NEVER
from whet.runtime.memo import LEVELS, Memo
from whet.runtime.memo_file import KEYS, Description, MemoError, MemoFile, create, describe
from whet.runtime.text import Text
from whet.timing import least_times

BUDGETS = {"strict": 0.2, "default": 1.0, "loose": 4.0}
"""Of each level, in units of the loss that is allowed: of the requests that hit (strict), or of all."""

_PAIRS = 100
"""Of records, that a key is learned from, at least."""
_HELD_OUT = 5
_LEAST = 100
"""Requests that are held out, at least."""
_MOST = 3000
_BUCKETS = (16, 32, 64, 128, 256, 512)
"""Lengths up to which requests are judged together."""
_TIMED = 24


@dataclass(frozen=True)
class Bucket:
    """Held-out requests of similar lengths; times are microseconds of one request on one thread."""

    lengths: tuple[int, int]
    requests: int
    plain: float
    hit: float
    """Without the look-up."""
    look_up: float
    hits: dict[str, float]
    """Share of the requests that are near enough, by level."""

    def gain(self, level: str) -> float:
        """Expected microseconds that looking up saves per request."""
        return self.hits[level] * (self.plain - self.hit) - self.look_up


@dataclass(frozen=True)
class MemoReport:
    """What a memo file holds, and what its levels did to the requests that were held out."""

    name: str
    count: int
    """Records."""
    bytes: int
    """That they take."""
    room: int
    """Bytes of the file."""
    held_out: int
    levels: dict[str, float]
    """Largest distance of a hit."""
    keys_of: dict[str, str]
    """The kind of key that it is a distance of: ``words`` or ``learned``."""
    hits: dict[str, float]
    """Share of the requests that hit, if all lengths look up."""
    loss: dict[str, float]
    """Points, 100 times the mean of ``whet.answer_loss.losses``: at least the classes in a hundred that change."""
    buckets: tuple[Bucket, ...]

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.count} records, {self.bytes / 1e6:.1f} MB of {self.room / 1e6:.1f}; "
            f"{self.held_out} requests held out"
        ]
        for level, distance in self.levels.items():
            lines.append(
                f"  {level}: {self.hits[level]:.1%} near enough (distance {distance:.4f}, key {self.keys_of[level]}), "
                f"{self.loss[level]:.2f} points lost"
            )
        for b in self.buckets:
            gains = {level: b.gain(level) for level in self.levels}
            paying = [level for level, gain in gains.items() if gain > 0]
            lines.append(
                f"  {b.lengths[0]} to {b.lengths[1]} tokens ({b.requests} requests): {b.plain:.0f} µs, "
                f"a hit {b.hit:.0f}, a look-up {b.look_up:.0f}; default level: {b.hits['default']:.1%} hit, "
                f"{gains['default']:+.0f} µs saved per request; "
                + (f"looks up at {', '.join(paying)}" if paying else "does not pay: no look-ups")
            )
        return "\n".join(lines)


def build(
    module: str | PathLike[str],
    output: str | PathLike[str],
    corpus: Sequence[Text],
    held_out: Sequence[Text] | None = None,
    *,
    memory: int = 1 << 30,
    max_loss: float = 0.5,
    progress: Progress | None = None,
) -> MemoReport:
    """Run a corpus and keep its attention (AttMemo, arXiv 2301.09262) for ``whet.load(…, memo=…)``.

    Which requests count as near enough, by level, is chosen on the held-out ones: the largest distance at which the
    loss, plus its standard error, stays within the budget. It is a distance of word embeddings or of a key that is
    learned of the records, whichever lets more requests hit (``strict``: of word embeddings). At which lengths looking
    up pays is measured here.

    Args:
        module: compiled with ``memo=True``.
        output: the file to write; it appears only when it is complete.
        corpus: texts or pairs. If they do not fit, those that occur most often are kept.
        held_out: the same, to choose on; default: a fifth of the corpus.
        memory: bytes of the file. What the corpus leaves free is room to grow.
        max_loss: most points to lose at the default level, see ``MemoReport.loss``; four times as much at the loose
            one. At the strict level a fifth of it, and of the requests that hit alone, however many these are.
        progress: told of every phase.

    Raises:
        MemoError: the module does not use records.
        ValueError: there is too little data, or memory for no record.

    """
    if not 0 <= max_loss <= 100:
        raise ValueError(f"max_loss is {max_loss}; expected points from 0 to 100")
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or name another output")
    progress = progress or Silent()
    session, to_the_end = load(module, threads=1), load(module, threads=1)
    if to_the_end.thresholds is not None:
        to_the_end.thresholds[:] = NEVER  # a record is of all layers, whoever leaves before
    if held_out is None:
        chosen = np.random.default_rng(0).permutation(len(corpus)) % _HELD_OUT == 0
        held_out = [text for text, out in zip(corpus, chosen, strict=True) if out]
        corpus = [text for text, out in zip(corpus, chosen, strict=True) if not out]
    if len(held_out) < _LEAST or len(corpus) == 0:
        raise ValueError(
            f"there are {len(corpus)} requests for the database and {len(held_out)} to choose on; expected at least "
            f"1 and {_LEAST}"
        )
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with progress.phase("read texts"):
            requests, others = session.requests(corpus), session.requests(held_out[:_MOST])
        description, kept = _plan(session, requests, memory)
        table = _word_embeddings(session)
        words = _projected(table, description.records.dimensions)
        create(unfinished, description, np.stack([words, np.zeros_like(words)]))
        memo = session.open_memo(unfinished, grow=True)
        with progress.phase("run the corpus", len(kept)) as advance:
            for i, tokens in enumerate(kept):
                with memo.adding(tokens) as room:
                    _run(to_the_end, [tokens], np.array([[0, room.address]]))
                advance(i + 1)
        memos = {"words": memo}
        with progress.phase("learn a key"):
            pairs = pairs_of(memo.file)
            if len(pairs.scale) >= _PAIRS:
                _put(fit_vectors(table, pairs, description.records.dimensions), memo)
                describe(unfinished, replace(description, keys_of=dict.fromkeys(LEVELS, "learned")))
                memos["learned"] = session.open_memo(unfinished)
        with progress.phase("choose distances and lengths"):
            report = _judge(session, memos, others, max_loss)
        pays = {level: [list(b.lengths) for b in report.buckets if b.gain(level) > 0] for level in LEVELS}
        judged = replace(description, levels=report.levels, keys_of=report.keys_of, pays=pays, report=asdict(report))
        describe(unfinished, judged)
        memo.file.flush()
        memo.file.release()
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return report


def inspect(path: str | PathLike[str], *, verify: bool = False) -> MemoReport:
    """What is known of a memo file; with ``verify`` all records are compared with their checksums first."""
    file = MemoFile(path)
    if verify:
        file.verify()
    report = file.description.report
    buckets = tuple(Bucket(**{**b, "lengths": tuple(b["lengths"])}) for b in report["buckets"])
    sizes = [file.description.record_size(int(n)) for n in file.entries["length"][: file.count]]
    return MemoReport(**{**report, "buckets": buckets, "count": file.count, "bytes": sum(sizes)})


@dataclass(frozen=True)
class MemoBench:
    """A stream of single requests with a memo file and without, in turns; times are milliseconds, by name.

    Of both, ``plain`` and ``memo``, the mean, the median, and the 95th percentile.
    """

    module: str
    memo: str
    level: str
    requests: int
    looked_up: int
    hits: int
    """Of all layers: one look-up serves them all."""
    look_up: float
    """Mean microseconds of a look-up."""
    mean: dict[str, float]
    median: dict[str, float]
    p95: dict[str, float]
    loss: float
    """Points, as of ``MemoReport``."""
    same: float
    """Share of requests whose answers have the same bits."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {t['plain']:.3f} ms plain, {t['memo']:.3f} with ({t['memo'] / t['plain'] - 1:+.1%})"
            for name, t in (("mean", self.mean), ("median", self.median), ("p95", self.p95))
        )
        return (
            f"{self.requests} requests, {self.looked_up} looked up ({self.look_up:.0f} µs each), {self.hits} hit "
            f"({self.hits / max(1, self.requests):.1%}, in all layers) at level {self.level}\n{times}\n"
            f"{self.loss:.2f} points lost; {self.same:.1%} of the answers have the same bits"
        )


def measure(
    module: str | PathLike[str],
    memo: str | PathLike[str],
    texts: Sequence[Text],
    *,
    level: str = "default",
    progress: Progress | None = None,
) -> MemoBench:
    """Run texts one by one, with the memo file and without, on one thread, the best of a few runs of each."""
    if not texts:
        raise ValueError("there are no texts to run; expected at least one")
    plain, with_memo = load(module, threads=1), load(module, threads=1, memo=memo, memo_level=level)
    assert with_memo.memo is not None
    requests = plain.requests(texts)
    times: dict[str, list[float]] = {"plain": [], "memo": []}
    answers: dict[str, list[NDArray[np.float32]]] = {"plain": [], "memo": []}
    hits = looked_up = 0
    spent = []
    with (progress or Silent()).phase("run the requests", len(requests)) as advance:
        for i, tokens in enumerate(requests):
            given = tokens[0], tokens[1], np.array([tokens.shape[1]])
            before = with_memo.memo.hits, with_memo.memo.misses
            for name, session in (("plain", plain), ("memo", with_memo)):
                answers[name].append(_one(session, given))
            hit, missed = with_memo.memo.hits - before[0], with_memo.memo.misses - before[1]
            hits, looked_up = hits + hit, looked_up + hit + missed
            best = least_times([partial(_one, session, given) for session in (plain, with_memo)])
            for name, seconds in zip(times, best, strict=True):
                times[name].append(seconds * 1e3)
            if hit + missed:
                spent.append(least_times([partial(with_memo.memo.find, *given)])[0] * 1e6)
            advance(i + 1)
    lost = losses(plain.metadata, answers["plain"], answers["memo"])
    statistics: list[Callable[[list[float]], Any]] = [np.mean, np.median, lambda t: np.percentile(t, 95)]
    mean, median, p95 = ({name: float(f(t)) for name, t in times.items()} for f in statistics)
    same = np.mean([np.array_equal(a, b) for a, b in zip(*answers.values(), strict=True)])
    return MemoBench(
        module=fspath(module),
        memo=fspath(memo),
        level=level,
        requests=len(requests),
        looked_up=looked_up,
        hits=hits,
        look_up=float(np.mean(spent)) if spent else 0.0,
        mean=mean,
        median=median,
        p95=p95,
        loss=100 * float(lost.mean()),
        same=float(same),
    )


def _plan(session: Session, requests: Sequence[NDArray[np.int32]], memory: int) -> tuple[Description, list[Any]]:
    """Which requests are kept, by length, and in what file."""
    metadata = session.metadata
    if metadata.records is None:
        raise MemoError(f"{session.path} was compiled without the use of records; compile it with --memo")
    description = Description(
        name=metadata.name,
        records=metadata.records,
        vocabulary=metadata.vocab_size,
        capacity=0,
        size=memory,
        levels=dict.fromkeys(LEVELS, 0.0),
        keys_of=dict.fromkeys(LEVELS, "words"),
        pays={level: [[1, metadata.max_length]] for level in LEVELS},
        report={},
    )
    by_tokens = {tokens.tobytes(): tokens for tokens in requests}
    often = [by_tokens[key] for key, _ in Counter(tokens.tobytes() for tokens in requests).most_common()]
    sizes = np.array([description.record_size(tokens.shape[1]) for tokens in often])
    # A record's place in the lists of entries and keys; and room to grow by records like these.
    overhead = 4 * len(KEYS) * metadata.records.dimensions + 64
    room = memory - description.first_record - (1 << 14)
    count = int(np.searchsorted(np.cumsum(sizes + overhead), room, side="right"))
    if not count:
        raise ValueError(
            f"memory is {memory} bytes, too little for any record; the first needs {sizes[0]} besides {memory - room}"
        )
    capacity = max(count, int(room / (sizes[:count].mean() + overhead)))
    return replace(description, capacity=capacity), sorted(often[:count], key=lambda tokens: tokens.shape[1])


def _put(vectors: NDArray[np.float32], memo: Memo) -> None:
    """Write learned vectors ``(vocabulary, dimensions)``, and each record's key by them."""
    file, kind = memo.file, KEYS.index("learned")
    file.vectors[kind] = vectors
    for i in range(file.count):
        file.keys[kind, i] = memo.keys_of(file.tokens(i))[kind]


def _word_embeddings(session: Session) -> NDArray[np.float32]:
    """The module's table ``(vocabulary, channels)``, centred."""
    metadata = session.metadata
    weights = open_artifact(session.path).weights(metadata)
    index = next(i for i, w in enumerate(metadata.weights) if len(w.shape) == 2 and w.shape[0] == metadata.vocab_size)
    table = np.asarray(weights[index]).astype(np.float32)
    if metadata.weights[index].dtype == "int8":
        table *= np.asarray(weights[index + 1]).astype(np.float32).reshape(-1, 1)
    table -= table.mean(axis=0)
    return table


def _projected(table: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Word embeddings on their principal axes, ``(vocabulary, dimensions)``."""
    axes = np.linalg.eigh(table.T @ table)[1][:, ::-1][:, :dimensions]
    vectors = np.zeros((len(table), dimensions), np.float32)
    vectors[:, : axes.shape[1]] = table @ axes
    return vectors


def _one(
    session: Session, given: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
) -> NDArray[np.float32]:
    ids, types, length = given
    return session.run_packed(ids, length, None, types)


def _run(
    session: Session, requests: Sequence[NDArray[np.int32]], records: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    ids, types = (np.concatenate([tokens[i] for tokens in requests]) for i in (0, 1))
    lengths = np.array([tokens.shape[1] for tokens in requests])
    rows = session.run_recorded(ids, lengths, None, types, records)
    return rows[:, : session.metadata.output.channels]


@dataclass(frozen=True)
class _Nearest:
    """The records that a kind of key finds nearest to requests, and what their use costs; an entry per request."""

    distances: NDArray[np.float64]
    addresses: NDArray[np.int64]
    losses: NDArray[np.float64]

    def level(self, name: str, max_loss: float) -> tuple[float, NDArray[np.bool_]]:
        """A level's distance, and which requests are near enough."""
        distance = _threshold(self.distances, self.losses, BUDGETS[name] * max_loss / 100, of_hits=name == "strict")
        return distance, self.distances <= distance


def _nearest(
    session: Session, memo: Memo, requests: Sequence[NDArray[np.int32]], plain: Sequence[NDArray[np.float32]]
) -> _Nearest:
    """Find records by the keys of ``memo``; ``plain`` are the answers without."""
    found = [memo.nearest(tokens) for tokens in requests]
    addresses = np.array([[0 if i is None else memo.file.address(i), 0] for i, _ in found])
    order = np.argsort(addresses[:, 0] != 0, kind="stable")
    answers = _answers(session, [requests[i] for i in order], addresses[order])
    lost = np.zeros(len(requests))
    lost[order] = losses(session.metadata, [plain[i] for i in order], answers)
    return _Nearest(np.array([distance for _, distance in found]), addresses, lost)


def _answers(
    session: Session, requests: Sequence[NDArray[np.int32]], records: NDArray[np.int64] | None
) -> list[NDArray[np.float32]]:
    """The rows of each request."""
    per_token = session.metadata.output.per == "token"
    ends = np.cumsum([tokens.shape[1] if per_token else 1 for tokens in requests])[:-1]
    return np.split(_run(session, requests, records), ends)


def _judge(
    session: Session, memos: dict[str, Memo], requests: Sequence[NDArray[np.int32]], max_loss: float
) -> MemoReport:
    """Choose the levels' keys and distances, and take times; ``memos`` are of one file, by the kind of their keys."""
    plain = _answers(session, requests, None)
    nearest = {kind: _nearest(session, memo, requests, plain) for kind, memo in memos.items()}
    keys_of: dict[str, str] = {}
    levels, near, loss = {}, {}, {}
    for level in LEVELS:
        # A learned distance of 0 is of requests that only have the same attention; one of words is of the same request.
        found = {k: n.level(level, max_loss) for k, n in nearest.items() if level != "strict" or k == "words"}
        kind = keys_of[level] = max(found, key=lambda kind: int(found[kind][1].sum()))
        levels[level], near[level] = found[kind]
        loss[level] = 100 * float(nearest[kind].losses[near[level]].sum() / len(requests))
    memo, addresses = memos["words"], nearest["words"].addresses
    buckets = []
    lengths = np.array([tokens.shape[1] for tokens in requests])
    first = 1
    for last in (*(b for b in _BUCKETS if b < session.metadata.max_length), session.metadata.max_length):
        inside = (lengths >= first) & (lengths <= last)
        timed = np.flatnonzero(inside & (addresses[:, 0] != 0))[:_TIMED]
        if len(timed):
            times = np.array([_times(session, memo, requests[i], addresses[i : i + 1]) for i in timed])
            hits = {level: float(n[inside].mean()) for level, n in near.items()}
            plain, hit, look_up = (1e6 * times.mean(axis=0)).tolist()
            buckets.append(Bucket((first, last), int(inside.sum()), plain, hit, look_up, hits))
        first = last + 1
    used = memo.file.entries["length"][: memo.file.count]
    return MemoReport(
        name=session.metadata.name,
        count=memo.file.count,
        bytes=sum(memo.file.description.record_size(int(n)) for n in used),
        room=memo.file.description.size,
        held_out=len(requests),
        levels=levels,
        keys_of=keys_of,
        hits={level: float(n.mean()) for level, n in near.items()},
        loss=loss,
        buckets=tuple(buckets),
    )


def _threshold(distances: NDArray[np.float64], losses: NDArray[np.float64], budget: float, *, of_hits: bool) -> float:
    """Largest distance at which, and below which, the mean loss and its standard error are within the budget.

    The mean is over all requests or over those that hit.
    """
    order = np.argsort(distances, kind="stable")
    order = order[np.isfinite(distances[order])]
    sums, squares = np.cumsum(losses[order]), np.cumsum(np.square(losses[order]))
    count = np.arange(1, len(order) + 1) if of_hits else len(losses)
    within = (sums + np.sqrt(squares)) / count <= budget
    hits = len(within) if within.all() else int(within.argmin())
    return float(distances[order[hits - 1]]) if hits else 0.0


def _times(session: Session, memo: Memo, tokens: NDArray[np.int32], records: NDArray[np.int64]) -> tuple[float, ...]:
    """Seconds of a request computed, of one that hits, and of a look-up."""
    ids, types, length = tokens[0], tokens[1], np.array([tokens.shape[1]])
    steps = [
        lambda: _run(session, [tokens], None),
        lambda: _run(session, [tokens], records),
        lambda: memo.find(ids, types, length),
    ]
    return tuple(least_times(steps))
