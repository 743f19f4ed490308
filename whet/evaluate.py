"""Scores a compiled module on labelled data, and compares its answers with those of another module.

The scores are the ones the data sets are published with: correlation for pairs with a similarity, accuracy for
classes, exact match and F1 for answers, accuracy and F1 for tags.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whet.datasets import Dataset, LabelledText, Question, ScoredPair, TaggedWords
from whet.metrics import class_of, cosines, exact_match, f1_score, pearson, spans, spearman
from whet.progress import Progress, Silent
from whet.runtime import Session

Array: TypeAlias = NDArray[Any]
Advance: TypeAlias = Callable[[int], None]

BATCH = 64
"""Texts given to a module at once; progress advances in these steps."""


@dataclass(frozen=True)
class Evaluation:
    """What a module scored."""

    module: str
    rows: int
    scores: dict[str, float]
    """Shares and correlations between -1 and 1; exact match and F1 in points of 100, as SQuAD and CoNLL have them."""
    seconds: float
    """Tokenisation included."""
    against: dict[str, float] = field(default_factory=dict)
    """How the answers agree with those of the other module, and its scores with the suffix ``_other``."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The evaluation as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.module}: {self.rows} rows in {self.seconds:.1f} s"]
        lines += [f"  {name:24} {value:.4f}" for name, value in (self.scores | self.against).items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def evaluate(
    session: Session, data: Dataset, progress: Progress | None = None, against: Session | None = None
) -> Evaluation:
    """Score ``session`` on ``data``; ``against`` is another build of the same model, such as its fp32.

    Raises:
        ValueError: the module's task is not what the rows ask for, or a label is none of the model's.

    """
    judge = _judge(session, data)
    progress = progress or Silent()
    seconds, scores, outputs = _run(judge, session, progress, "evaluate")
    agreement: dict[str, float] = {}
    if against is not None:
        _, other_scores, other_outputs = _run(judge, against, progress, "evaluate the other module")
        agreement = judge.agreement(outputs, other_outputs)
        agreement |= {f"{name}_other": value for name, value in other_scores.items()}
        agreement |= {f"{name}_difference": scores[name] - value for name, value in other_scores.items()}
    return Evaluation(
        module=str(session.path),
        rows=len(data.rows),
        scores=scores,
        seconds=seconds,
        against=agreement,
        notes=data.notes,
    )


def _run(judge: _Judge, session: Session, progress: Progress, name: str) -> tuple[float, dict[str, float], Any]:
    start = time.perf_counter()
    with progress.phase(name, judge.count) as advance:
        outputs = judge.answer(session, advance)
    return time.perf_counter() - start, judge.score(outputs), outputs


class _Judge(Protocol):
    """One way of scoring: ask the module, score its outputs, compare them with another module's."""

    count: int

    def answer(self, session: Session, advance: Advance) -> Any: ...
    def score(self, outputs: Any) -> dict[str, float]: ...
    def agreement(self, outputs: Any, other: Any) -> dict[str, float]: ...


def _judge(session: Session, data: Dataset) -> _Judge:
    task = session.metadata.task
    kind = type(data.rows[0])
    if kind is ScoredPair and task == "embedding":
        return _Similarity([r for r in data.rows if isinstance(r, ScoredPair)])
    if kind is ScoredPair and task == "sequence_classification" and session.metadata.output.channels == 1:
        return _PairScore([r for r in data.rows if isinstance(r, ScoredPair)])
    if kind is LabelledText and task == "sequence_classification":
        return _Classes([r for r in data.rows if isinstance(r, LabelledText)], session)
    if kind is Question and task == "question_answering":
        return _Answers([r for r in data.rows if isinstance(r, Question)])
    if kind is TaggedWords and task == "token_classification":
        return _Tags([r for r in data.rows if isinstance(r, TaggedWords)], session)
    wanted = {
        ScoredPair: "an embedding model, or a classifier with one label",
        LabelledText: "a sequence_classification model",
        Question: "a question_answering model",
        TaggedWords: "a token_classification model",
    }
    raise ValueError(f"{session.path} is a {task} model; this data asks for {wanted[kind]}")


class _Similarity:
    """Correlation of cosine similarities with the scores of people."""

    def __init__(self, rows: list[ScoredPair]) -> None:
        self.rows = rows
        self.count = 2 * len(rows)

    def answer(self, session: Session, advance: Advance) -> Array:
        texts = [text for row in self.rows for text in (row.first, row.second)]
        return np.concatenate([session.encode(part) for part in _batches(texts, advance)])

    def score(self, outputs: Array) -> dict[str, float]:
        return _correlations(cosines(outputs[::2], outputs[1::2]), self.rows)

    def agreement(self, outputs: Array, other: Array) -> dict[str, float]:
        found = cosines(outputs, other)
        return {"cosine_mean": float(found.mean()), "cosine_least": float(found.min())}


class _PairScore:
    """Correlation of a cross-encoder's only logit with the scores of people."""

    def __init__(self, rows: list[ScoredPair]) -> None:
        self.rows = rows
        self.count = len(rows)

    def answer(self, session: Session, advance: Advance) -> Array:
        pairs = [(row.first, row.second) for row in self.rows]
        return np.concatenate([session.logits(part)[:, 0] for part in _batches(pairs, advance)])

    def score(self, outputs: Array) -> dict[str, float]:
        return _correlations(outputs, self.rows)

    def agreement(self, outputs: Array, other: Array) -> dict[str, float]:
        return {"logit_difference_most": float(np.abs(outputs - other).max())}


class _Classes:
    """Share of texts whose class the model finds."""

    def __init__(self, rows: list[LabelledText], session: Session) -> None:
        self.rows = rows
        self.count = len(rows)
        self.classes = session.metadata.output.channels
        if self.classes < 2:
            raise ValueError(f"{session.path} has a single label; accuracy needs a classifier with two or more")
        self.expected = np.array(
            [class_of(row.label, session.metadata.labels, self.classes) for row in rows], dtype=np.int64
        )

    def answer(self, session: Session, advance: Advance) -> Array:
        if session.metadata.output.channels != self.classes:
            raise ValueError(f"{session.path} has {session.metadata.output.channels} labels; expected {self.classes}")
        texts = [row.text for row in self.rows]
        return np.concatenate([session.logits(part) for part in _batches(texts, advance)])

    def score(self, outputs: Array) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(axis=1) == self.expected).mean())}

    def agreement(self, outputs: Array, other: Array) -> dict[str, float]:
        return {
            "same_class": float((outputs.argmax(axis=1) == other.argmax(axis=1)).mean()),
            "logit_cosine_mean": float(cosines(outputs, other).mean()),
        }


class _Answers:
    """Exact match and F1 of answers, with the normalisation of SQuAD's own script (Rajpurkar et al. 2016)."""

    def __init__(self, rows: list[Question]) -> None:
        self.rows = rows
        self.count = len(rows)

    def answer(self, session: Session, advance: Advance) -> list[str]:
        answers = []
        for i, row in enumerate(self.rows, 1):
            answers.append(session.answer(row.question, row.context)["answer"])
            advance(i)
        return answers

    def score(self, outputs: Sequence[str]) -> dict[str, float]:
        pairs = list(zip(outputs, self.rows, strict=True))
        exact = [max(exact_match(answer, gold) for gold in row.answers) for answer, row in pairs]
        f1 = [max(f1_score(answer, gold) for gold in row.answers) for answer, row in pairs]
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}

    def agreement(self, outputs: Sequence[str], other: Sequence[str]) -> dict[str, float]:
        pairs = list(zip(outputs, other, strict=True))
        return {
            "same_answer": float(np.mean([a == b for a, b in pairs])),
            "answer_f1": 100 * float(np.mean([f1_score(a, b) for a, b in pairs])),
        }


class _Tags:
    """Share of words whose tag the model finds, and F1 of the stretches they mark, as CoNLL's own script counts."""

    def __init__(self, rows: list[TaggedWords], session: Session) -> None:
        self.rows = rows
        self.count = len(rows)
        self.expected = [row.tags for row in rows]
        names, labels = {tag for tags in self.expected for tag in tags} - {"O"}, session.metadata.labels
        if names and names.isdisjoint(labels):
            shown = [", ".join(sorted(of)[:8]) for of in (names, labels)]
            raise ValueError(f"the data has the tags {shown[0]}; none but O is a label of {session.path} ({shown[1]})")

    def answer(self, session: Session, advance: Advance) -> list[list[str]]:
        found = []
        for i, row in enumerate(self.rows, 1):
            found.append(word_tags(session, row.words))
            advance(i)
        return found

    def score(self, outputs: Sequence[Sequence[str]]) -> dict[str, float]:
        scores = {"accuracy": _same(outputs, self.expected)}
        pairs = [(spans(found), spans(gold)) for found, gold in zip(outputs, self.expected, strict=True)]
        if any(gold for _, gold in pairs):
            right, total = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
            scores["f1"] = 100 * 2 * right / total
        return scores

    def agreement(self, outputs: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"same_tag": _same(outputs, other)}


def _same(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Share of the tags that are equal."""
    return float(np.mean([a == b for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)]))


def word_tags(session: Session, words: Sequence[str]) -> list[str]:
    """The label of the first token of every word; empty where a word has no token."""
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    tags = [""] * len(words)
    for token in session.tag(" ".join(words), level="token")[0]:
        place = bisect_right(starts, token["start"]) - 1
        tags[place] = tags[place] or token["label"]
    return tags


def _correlations(values: Array, rows: Sequence[ScoredPair]) -> dict[str, float]:
    gold = np.array([row.score for row in rows])
    return {"spearman": spearman(values, gold), "pearson": pearson(values, gold)}


def _batches(items: list[Any], advance: Advance) -> Iterator[list[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
        advance(min(start + BATCH, len(items)))
