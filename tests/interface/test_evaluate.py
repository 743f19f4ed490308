"""The sessions here are made up: what is tested is the scoring."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from whet.datasets import Dataset, LabelledText, Question, ScoredPair, TaggedWords
from whet.evaluate import evaluate


class FakeSession:
    """Answers from tables."""

    path = "fake.so"

    def __init__(self, task, channels=2, labels=(), **tables):
        self.metadata = SimpleNamespace(task=task, labels=labels, output=SimpleNamespace(channels=channels))
        self.tables = tables

    def encode(self, texts):
        return np.array([self.tables["vectors"][t] for t in texts], np.float32)

    def logits(self, texts):
        return np.array([self.tables["logits"][t] for t in texts], np.float32)

    def answer(self, question, context):
        return {"answer": self.tables["answers"][question]}

    def tag(self, text, level):
        assert level == "token"
        return [[{"start": text.index(piece), "label": label} for piece, label in self.tables["tags"][text]]]


class Recorder:
    def __init__(self):
        self.seen = []

    @contextmanager
    def phase(self, name, total=None):
        yield lambda done: self.seen.append((name, done, total))


def test_similarity():
    vectors = {"a": (1, 0), "b": (1, 0.1), "c": (1, 2), "d": (-1, 0.5)}
    session = FakeSession("embedding", vectors=vectors)
    rows = [ScoredPair("a", "b", 5), ScoredPair("a", "c", 3), ScoredPair("a", "d", 0)]
    result = evaluate(session, Dataset(rows, ("a note",)))
    assert result.scores["spearman"] == pytest.approx(1)
    assert result.scores["pearson"] == pytest.approx(0.990, abs=0.005)
    assert (result.rows, result.notes, result.against) == (3, ("a note",), {})
    assert json.loads(result.to_json())["scores"] == result.scores
    worse = FakeSession("embedding", vectors=vectors | {"d": (1, 0.5)})
    result = evaluate(worse, Dataset(rows), against=session)
    assert result.scores["spearman"] == pytest.approx(0.5)
    assert result.against["spearman_other"] == pytest.approx(1)
    assert result.against["spearman_difference"] == pytest.approx(-0.5)
    assert result.against["cosine_least"] == pytest.approx((-1 + 0.25) / 1.25)
    assert result.against["cosine_mean"] == pytest.approx((5 + (-1 + 0.25) / 1.25) / 6)


def test_a_cross_encoder_scores_pairs():
    logits = {("a", "b"): [2.0], ("a", "c"): [-1.0], ("b", "c"): [0.0]}
    session = FakeSession("sequence_classification", 1, logits=logits)
    rows = [ScoredPair("a", "b", 5), ScoredPair("a", "c", 1), ScoredPair("b", "c", 2)]
    assert evaluate(session, Dataset(rows)).scores["spearman"] == pytest.approx(1)


def test_accuracy_counts_right_classes_over_batches():
    texts = [str(i) for i in range(150)]
    logits = {t: ([0, 1] if int(t) % 3 else [1, 0]) for t in texts}
    session = FakeSession("sequence_classification", labels=("bad", "good"), logits=logits)
    rows = [LabelledText(t, "good") for t in texts]
    progress = Recorder()
    result = evaluate(session, Dataset(rows), progress)
    assert result.scores == {"accuracy": pytest.approx(100 / 150)}
    assert progress.seen == [("evaluate", 64, 150), ("evaluate", 128, 150), ("evaluate", 150, 150)]
    other = FakeSession("sequence_classification", logits=dict.fromkeys(texts, (0, 1)))
    assert evaluate(session, Dataset(rows), against=other).against["same_class"] == pytest.approx(100 / 150)


def test_answers_take_the_best_of_what_people_said():
    session = FakeSession("question_answering", answers={"who": "the Normans", "when": "10th century"})
    rows = [Question("1", "who", "…", ("Vikings", "Normans")), Question("2", "when", "…", ("10th and 11th",))]
    result = evaluate(session, Dataset(rows), against=session)
    assert result.scores == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 5) / 2)}
    assert result.against["same_answer"] == 1
    assert result.against["f1_difference"] == 0


def test_tags_are_those_of_first_tokens():
    rows = [TaggedWords(("New", "York", "is", "big"), ("B-loc", "I-loc", "O", "O")), TaggedWords(("Ann",), ("B-per",))]
    labels = ("O", "B-loc", "I-loc")
    tags = {
        "New York is big": [("New", "B-loc"), ("Yo", "I-loc"), ("rk", "O"), ("is", "O"), ("big", "I-loc")],
        "Ann": [],  # a word without a token is wrong, and so is a tag that the model does not have
    }
    result = evaluate(FakeSession("token_classification", labels=labels, tags=tags), Dataset(rows))
    assert result.scores == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(100 * 2 / 4)}
    session = FakeSession("token_classification", labels=("X", "O"), tags={"a b": [("a", "X"), ("b", "O")]})
    result = evaluate(session, Dataset([TaggedWords(("a", "b"), ("X", "X"))]), against=session)
    assert result.scores == {"accuracy": 0.5}, "tags that mark no stretches have no F1"
    assert result.against["same_tag"] == 1 and result.against["accuracy_difference"] == 0


@pytest.mark.parametrize(
    ("session", "row", "message"),
    [
        (FakeSession("token_classification"), ScoredPair("a", "b", 1), "asks for an embedding model"),
        (FakeSession("sequence_classification", 2), ScoredPair("a", "b", 1), "with one label"),
        (FakeSession("embedding"), LabelledText("a", "1"), "asks for a sequence_classification"),
        (FakeSession("embedding"), Question("1", "q", "c", ("a",)), "asks for a question_answering"),
        (FakeSession("sequence_classification", 1), LabelledText("a", "0"), "single label"),
        (FakeSession("sequence_classification", 2), LabelledText("a", "neutral"), "label 'neutral'"),
        (FakeSession("embedding"), TaggedWords(("a",), ("O",)), "asks for a token_classification"),
        (
            FakeSession("token_classification", labels=("O", "B-per")),
            TaggedWords(("a",), ("B-loc",)),
            r"has the tags B-loc; none but O is a label of fake.so \(B-per, O\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(session, row, message):
    with pytest.raises(ValueError, match=message):
        evaluate(session, Dataset([row]))
