"""Texts in, answers out, on hand-made models whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_module
from tiny_module import CHANNELS, MAX_LENGTH, columns, weights
from tokenizers import Tokenizer

from whet.runtime import load
from whet.runtime.spans import softmax

TEXTS = ["the cat runs", "", "a dog plays guitar on stage , the man runs in the park", "ünïcödé ☃ 🎸", "the " * 200]
LONG = "the cat runs fast in the park , a dog plays the guitar on stage in the red house . the man runs slow"


@pytest.fixture(scope="module")
def sessions(modules):
    return {name: load(path, threads=1) for name, path in modules.items()}


def per_token(text, channels, max_length=MAX_LENGTH):
    """The oracle: a row per token of a text or pair."""
    tokenizer = Tokenizer.from_str(tiny_module.tokenizer_json())
    tokenizer.enable_truncation(max_length)
    encoding = tokenizer.encode(*text) if isinstance(text, tuple) else tokenizer.encode(text)
    return columns(encoding.ids, np.arange(len(encoding)), encoding.type_ids, weights(channels))


def test_encode(sessions):
    out = sessions["embedding"].encode(TEXTS)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [per_token(t, CHANNELS).sum(axis=0) for t in TEXTS], rtol=1e-4, atol=1e-4)


def test_encode_one_none_and_many(sessions):
    encode = sessions["embedding"].encode
    assert encode("the cat").shape == (1, CHANNELS)
    assert encode([]).shape == (0, CHANNELS)
    many = encode(TEXTS * 150)
    np.testing.assert_array_equal(many, np.tile(encode(TEXTS), (150, 1)))


def test_answers_do_not_depend_on_neighbours(sessions):
    together = sessions["embedding"].encode(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(sessions["embedding"].encode([text])[0], together[i])


def test_tokenizing_in_threads_changes_nothing(modules, sessions):
    np.testing.assert_array_equal(load(modules["embedding"], 2).encode(TEXTS), sessions["embedding"].encode(TEXTS))


def test_classify(sessions):
    session = sessions["classifier"]
    inputs = [*TEXTS, ("the cat", "a dog"), ("", "")]
    logits = np.array([per_token(t, 3).sum(axis=0) for t in inputs])
    np.testing.assert_allclose(session.logits(inputs), logits, rtol=1e-3, atol=1e-4)
    scores = softmax(session.logits(inputs))
    for result, row in zip(session.classify(inputs), scores, strict=True):
        assert result["label"] == "xyz"[row.argmax()]
        assert result["score"] == pytest.approx(row.max())
    for results, row in zip(session.classify(inputs, top_k=9), scores, strict=True):
        assert [r["label"] for r in results] == ["xyz"[i] for i in np.argsort(-row)]
        assert sum(r["score"] for r in results) == pytest.approx(1)
    assert [len(r) for r in session.classify(inputs, top_k=1)] == [1] * len(inputs)
    assert session.classify("the cat") == session.classify(["the cat"])
    assert session.classify([]) == []
    with pytest.raises(ValueError, match="top_k is 0"):
        session.classify("the cat", top_k=0)


def test_labels_may_be_missing(tmp_path):
    path = tiny_module.write(
        tmp_path / "m.so", "request", tiny_module.tokenizer_json(), 3, task="sequence_classification"
    )
    assert load(path).classify("the cat")[0]["label"].startswith("LABEL_")


def test_labels_that_do_not_exclude_one_another(sessions, monkeypatch):
    session = sessions["classifier"]
    monkeypatch.setattr(session, "metadata", replace(session.metadata, multi_label=True))
    logits = session.logits(["the cat"])[0]
    got = {label["label"]: label["score"] for label in session.classify(["the cat"], top_k=3)[0]}
    assert got == pytest.approx({name: 1 / (1 + np.exp(-x)) for name, x in zip("xyz", logits, strict=True)}, rel=1e-4)


def test_score(sessions):
    pairs = [("the cat", "a dog"), ("the cat", ""), ("the " * 100, "dog " * 100)]
    logits = np.array([per_token(p, 1).sum() for p in pairs])
    scores = sessions["reranker"].score(pairs)
    assert scores.shape == (3,)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-4)
    label = sessions["reranker"].classify(pairs[:1])[0]
    assert label == {"label": "relevant", "score": pytest.approx(scores[0])}
    assert sessions["reranker"].score([]).shape == (0,)
    with pytest.raises(ValueError, match="expected a pair"):
        sessions["reranker"].score(["the cat"])
    with pytest.raises(ValueError, match=r"has 3 labels, score\(\) is for one; use classify\(\)"):
        sessions["classifier"].score(pairs)


def test_tag_words(sessions):
    text = "The dogs, plays"
    [tags] = sessions["tagger"].tag(text)
    assert [(t["text"], t["start"], t["end"]) for t in tags] == [
        ("The", 0, 3), ("dogs", 4, 8), (",", 8, 9), ("plays", 10, 15),
    ]  # fmt: skip
    rows = softmax(per_token(text, 4))[[1, 2, 4, 5]]  # dogs is dog and ##s
    assert [t["label"] for t in tags] == ["OBIE"[i] for i in rows.argmax(axis=1)]
    np.testing.assert_allclose([t["score"] for t in tags], rows.max(axis=1), rtol=1e-5)


def test_tag_tokens(sessions):
    [tags] = sessions["tagger"].tag(["The dogs"], level="token")
    assert [t["text"] for t in tags] == ["The", "dog", "s"]
    with pytest.raises(ValueError, match="level is 'line'"):
        sessions["tagger"].tag("the", level="line")


def test_tag_reads_all_of_a_long_text(sessions):
    [tags] = sessions["tagger"].tag([LONG])
    assert [t["text"] for t in tags] == LONG.split()
    assert all(LONG[t["start"] : t["end"]] == t["text"] for t in tags)


def test_tag_nothing(sessions):
    assert sessions["tagger"].tag("") == [[]]
    assert sessions["tagger"].tag([]) == []
    assert sessions["tagger"].tag([" ", "the"])[0] == []


def all_spans(question, context, max_length=16):
    """Every answer in every window with its score, by the definition."""
    tokenizer = Tokenizer.from_str(tiny_module.tokenizer_json())
    head, body = (tokenizer.encode(t, add_special_tokens=False) for t in (question, context))
    room = max_length - len(head) - 3
    step = room - room // 2
    scores = {}
    for start in range(0, max(1, len(body) - room // 2), step):
        ids = [2, *head.ids, 3, *body.ids[start : start + room], 3]
        types = [0] * (len(head) + 2) + [1] * (len(ids) - len(head) - 2)
        rows = columns(ids, np.arange(len(ids)), types, weights(2))
        inner = np.arange(len(head) + 2, len(ids) - 1)
        p = np.exp(rows) / np.exp(rows[[0, *inner]]).sum(axis=0)
        for a in inner:
            for b in inner[inner >= a]:
                words = (body.word_ids[start + a - inner[0]], body.word_ids[start + b - inner[0]])
                key = body.word_to_chars(words[0])[0], body.word_to_chars(words[1])[1]
                scores[key] = max(scores.get(key, 0), p[a, 0] * p[b, 1])
    return scores


@pytest.mark.parametrize("context", ["the dogs runs", LONG, "the"])
def test_answer(sessions, context):
    question = "the cat ?"
    expected = sorted(all_spans(question, context).items(), key=lambda item: -item[1])
    answers = sessions["answerer"].answer(question, context, top_k=3)
    assert [(a["start"], a["end"]) for a in answers] == [key for key, _ in expected[:3]]
    np.testing.assert_allclose([a["score"] for a in answers], [s for _, s in expected[:3]], rtol=1e-4)
    for answer in answers:
        assert answer["answer"] == context[answer["start"] : answer["end"]]
    assert sessions["answerer"].answer(question, context) == answers[0]


def test_answer_length_is_limited(sessions):
    answers = sessions["answerer"].answer("the ?", LONG, top_k=50, max_answer_length=1)
    assert all(" " not in a["answer"] for a in answers)


def test_answer_without_context(sessions):
    nothing = {"answer": "", "start": 0, "end": 0, "score": 0.0}
    assert sessions["answerer"].answer("the cat ?", "") == nothing
    assert sessions["answerer"].answer("", "the cat")["answer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "the " * 20, "context": "a"}, "question has 20 tokens"),
        ({"question": ["the"], "context": "a"}, "question is \\['the'\\], a list"),
        ({"question": "the", "context": None}, "context is None"),
        ({"question": "the", "context": "a", "top_k": 0}, "top_k is 0"),
        ({"question": "the", "context": "a", "max_answer_length": 0}, "max_answer_length is 0"),
        ({"question": "the", "context": "a", "doc_stride": -1}, "doc_stride is -1"),
    ],
)
def test_answer_checks_its_input(sessions, arguments, message):
    with pytest.raises(ValueError, match=message):
        sessions["answerer"].answer(**arguments)


def test_texts_are_checked(sessions):
    with pytest.raises(ValueError, match="text 1 is None, a NoneType; expected a str"):
        sessions["embedding"].encode(["a", None])
    with pytest.raises(ValueError, match="text 0 is"):
        sessions["embedding"].encode([("a", "b")])


@pytest.mark.parametrize(
    ("module", "right"),
    [
        ("embedding", "encode"), ("classifier", "classify"), ("tagger", "tag"), ("answerer", "answer"),
        ("token", "run"),
    ],
)  # fmt: skip
def test_the_wrong_method_names_the_right_one(sessions, module, right):
    calls = {
        "encode": ("a",), "classify": ("a",), "logits": ("a",), "score": ([("a", "b")],), "tag": ("a",),
        "answer": ("a", "b"),
    }  # fmt: skip
    same = {"classify": ("classify", "logits", "score")}.get(right, (right,))
    for method, arguments in calls.items():
        if method not in same:
            with pytest.raises(ValueError, match=rf"use {right}\(\)"):
                getattr(sessions[module], method)(*arguments)


def test_without_a_tokenizer(tmp_path):
    path = tiny_module.write(tmp_path / "m.so", "request", task="embedding")
    with pytest.raises(ValueError, match=r"m\.so was compiled without a tokenizer; give token ids to run\(\)"):
        load(path).encode("a")


def test_padded_modules_take_texts_too(tmp_path):
    path = tiny_module.write(
        tmp_path / "m.so", tokenizer=tiny_module.tokenizer_json(), channels=4, task="token_classification",
        convention="padded", inputs=("input_ids", "attention_mask"), labels=tuple("OBIE"), max_length=16,
    )  # fmt: skip
    [short, long] = load(path, 1).tag(["the cat", LONG])
    word = weights(4)["word"]
    assert [t["label"] for t in short] == ["OBIE"[word[i].argmax()] for i in (8, 10)]
    assert [t["text"] for t in long] == LONG.split()
