import gzip
import json
import math

import pytest

from whet.compress.data import (
    Span,
    all_labels,
    check_examples,
    examples_of,
    hold_out,
    read_examples,
    read_unlabelled,
    texts_of,
)
from whet.compress.recipe import Data, Recipe
from whet.datasets import LabelledText, ScoredPair, TaggedWords


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def squad(tmp_path, articles=4, start=4):
    paragraph = {
        "context": "The cook ate bread.",
        "qas": [
            {"id": "1", "question": "Who?", "answers": [{"text": "cook", "answer_start": start}]},
            {"id": "2", "question": "None?", "answers": [], "is_impossible": True},
        ],
    }
    data = [{"title": f"t{i}", "paragraphs": [paragraph, paragraph]} for i in range(articles)]
    return write(tmp_path / "q.json", json.dumps({"data": data}))


def test_plain_texts(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n  two  \n")
    assert read_examples([path], "embedding") == ["one", "two"]
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("zwölf\n")
    assert read_examples([path, str(tmp_path / "b.txt.gz")], "embedding") == ["one", "two", "zwölf"]
    assert read_examples([path], "embedding", limit=1) == ["one"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"a, b",x\nc,y\n'),
        ("a.tsv", "text\tlabel\na, b\tx\nc\ty\n"),
        ("a.jsonl", '{"text": "a, b", "label": "x"}\n{"text": "c", "label": "y"}\n'),
    ],
)
def test_labelled_texts(tmp_path, name, text):
    rows = read_examples([write(tmp_path / name, text)], "sequence_classification")
    assert rows == [LabelledText("a, b", "x"), LabelledText("c", "y")]
    assert texts_of(rows) == ["a, b", "c"] and all_labels(rows) == ("x", "y")


def test_pairs_and_columns_of_other_names(tmp_path):
    path = write(tmp_path / "a.csv", "q1,q2,intent\na,b,1\n")
    columns = {"text_a": "q1", "text_b": "q2", "label": "intent"}
    assert read_examples([path], "sequence_classification", columns=columns) == [LabelledText(("a", "b"), "1")]
    (pair,) = read_examples([path], "embedding", columns=columns)
    assert (pair.first, pair.second) == ("a", "b") and math.isnan(pair.score)
    scored = write(tmp_path / "s.csv", "text_a,text_b,score\na,b,2.5\n")
    assert read_examples([scored], "embedding") == [ScoredPair("a", "b", 2.5)]


def test_tagged_words(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"words": ["a", "b"], "tags": ["O", "B"]}\n{"words": "c d", "tags": "O O"}\n')
    rows = read_examples([path], "token_classification")
    assert rows == [TaggedWords(("a", "b"), ("O", "B")), TaggedWords(("c", "d"), ("O", "O"))]
    conll = write(tmp_path / "a.conll", "a O\nb B\n\nc O\n")
    tagged = read_examples([conll], "token_classification")
    assert tagged == [TaggedWords(("a", "b"), ("O", "B")), TaggedWords(("c",), ("O",))]
    assert texts_of(tagged) == read_unlabelled([conll], pairs=False) == ["a b", "c"]
    with pytest.raises(ValueError, match="no data for sequence_classification"):
        read_examples([conll], "sequence_classification")
    with pytest.raises(ValueError, match=r"a.jsonl:1: expected as many tags as words"):
        read_examples([write(tmp_path / "a.jsonl", '{"words": ["a"], "tags": []}')], "token_classification")


def test_questions_are_split_by_article(tmp_path):
    rows = read_examples([squad(tmp_path)], "question_answering")
    assert rows[0] == Span("Who?", "The cook ate bread.", 4, 8, "t0") and len(rows) == 8
    training, development = hold_out(rows, 0.25, seed=1)
    assert len(development) == 2 and not {e.article for e in training} & {e.article for e in development}
    with pytest.raises(ValueError, match="of one article"):
        hold_out(rows[:2], 0.25, seed=1)
    with pytest.raises(ValueError, match="does not stand at 5"):
        read_examples([squad(tmp_path, start=5)], "question_answering")


def test_texts_without_labels(tmp_path):
    texts = write(tmp_path / "a.txt", "one\ntwo\n")
    pairs = write(tmp_path / "a.csv", "question,passage,score\nwho?,the cook,\nwhat?,bread,9\n")
    labelled = write(tmp_path / "b.csv", "text,label\nthree,\n")
    assert read_unlabelled([texts, labelled], pairs=False) == ["one", "two", "three"]
    columns = {"text_a": "question", "text_b": "passage"}
    assert read_unlabelled([pairs], True, columns) == [("who?", "the cook"), ("what?", "bread")]
    assert read_unlabelled([squad(tmp_path, articles=1)], pairs=True) == [
        (question, "The cook ate bread.") for question in ("Who?", "None?", "Who?", "None?")
    ]
    assert read_unlabelled([], pairs=True) == []
    with pytest.raises(ValueError, match=r"a\.txt has 'one'; expected pairs"):
        read_unlabelled([texts], pairs=True)
    with pytest.raises(ValueError, match="expected single texts, like the labelled data"):
        read_unlabelled([pairs], False, columns)


def test_texts_without_labels_are_trained_on_and_never_held_out(tmp_path):
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    train = write(tmp_path / "a.csv", "text,label\n" + rows)
    data = Data(train=(train,), unlabelled=(write(tmp_path / "b.txt", "one\ntwo\n"),))
    recipe = Recipe(model="m", task="sequence_classification", teacher="m", data=data)
    training, development = examples_of(recipe)
    assert training[-2:] == ["one", "two"] and len(training) == 21 and len(development) == 1
    assert all_labels(training) == ("0", "1")


def test_a_split_is_seeded_and_whole():
    rows = [f"text {i}" for i in range(100)]
    training, development = hold_out(rows, 0.05, seed=0)
    assert len(development) == 5 and sorted(training + development) == sorted(rows)
    assert hold_out(rows, 0.05, seed=0)[1] == development != hold_out(rows, 0.05, seed=1)[1]


def test_labels_that_are_numbers_are_sorted_by_value():
    assert all_labels([LabelledText("a", label) for label in ("10", "2", "b", "a")]) == ("2", "10", "a", "b")


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.txt", b"", "embedding", "holds no rows"),
        ("a.txt", b"\xff\xfe bad", "embedding", "is not UTF-8 text"),
        ("a.csv", b"text,label\n", "sequence_classification", "holds no rows"),
        (
            "a.csv",
            b"sentence,label\na,b\n",
            "sequence_classification",
            "has the columns sentence, label; expected text",
        ),
        ("a.csv", b"text,category\na,b\n", "sequence_classification", "text, category; expected a label"),
        ("a.csv", b"text,label\n,x\n", "sequence_classification", "text is ''; expected a text"),
        ("a.csv", b"text,label\na\n", "sequence_classification", "another number of fields"),
        ("a.csv", b"text_a,text_b,score\na,b,high\n", "embedding", "a.csv:2: could not convert"),
        ("a.jsonl", b"{", "embedding", "a.jsonl:1 is not JSON"),
        ("a.jsonl", b"[1]", "embedding", "expected an object"),
        ("a.json", b"{}", "question_answering", "is not SQuAD JSON"),
        ("a.csv", b"text,label\na,b\n", "question_answering", "needs SQuAD JSON"),
        ("a.txt", b"a\n", "sequence_classification", "needs labels"),
        ("a.parquet", b"a\n", "embedding", "the format of .* is ''; expected one of texts, csv"),
    ],
)
def test_bad_files_are_refused_with_their_name(tmp_path, name, content, task, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples([str(path)], task)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        read_examples([str(tmp_path / "none.txt")], "embedding")
    with pytest.raises(ValueError, match="no data is given"):
        read_examples([], "embedding")
    with pytest.raises(ValueError, match="columns names 'category'"):
        read_examples(["a.csv"], "embedding", columns={"category": "x"})


def test_too_few_rows_and_a_single_class_are_refused():
    rows = [LabelledText(f"text {i}", "x") for i in range(20)]
    with pytest.raises(ValueError, match=r"train.csv has a single label, 'x'; expected at least 2"):
        check_examples(rows, "sequence_classification", "train.csv")
    with pytest.raises(ValueError, match="has 3 rows for embedding; expected at least 8"):
        check_examples(["a", "b", "c"], "embedding", "a.txt")
    check_examples([*rows, LabelledText("b", "y")], "sequence_classification", "train.csv")
