"""Training data: texts, labelled texts, tagged words and questions, from the formats users have.

What :mod:`whet.datasets` reads for scoring is read by it; this adds plain texts, JSON lines and tagged words, columns
of other names, and what has to hold before a training that may take hours.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from whet.datasets import FORMATS as SCORED_FORMATS
from whet.datasets import LabelledText, Question, ScoredPair, TaggedWords, Text, read_dataset

from .recipe import Recipe, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """A question, its context, and the characters of the context that answer it."""

    question: str
    context: str
    start: int
    end: int
    article: str
    """What the context is from: a split puts all of it on one side."""


Example: TypeAlias = "Text | LabelledText | ScoredPair | TaggedWords | Span"

SUFFIXES = {".txt": "texts", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "squad", ".conll": "conll"}
"""Formats by the ending of the file, of which ``.gz`` is taken off first."""
FORMATS = tuple(dict.fromkeys([*SUFFIXES.values(), *SCORED_FORMATS]))
COLUMNS = ("text", "text_a", "text_b", "label", "score", "words", "tags")
"""What a column can mean; files with other names are read with ``columns``."""
SCORED = {"sequence_classification": LabelledText, "token_classification": TaggedWords}
"""Rows of published formats that a task is trained on."""
LEAST = 8
"""Rows that training needs at least."""
HELD_OUT = 0.05
"""Share of the training data that is scored, where no development data is given."""
MOST_SCORED = 2000
"""Held-out rows are at most so many."""


def read_examples(
    paths: Sequence[str], task: Task, format: str = "", columns: dict[str, str] | None = None, limit: int = 0
) -> list[Example]:
    """Read the files of a data set as examples for ``task``; ``format`` is by default told by the ending of each.

    ``columns`` maps a meaning (``"label"``) to the name of the column in the file (``"category"``). ``limit`` keeps the
    first rows only. Raises ValueError where a file can't be read as that, FileNotFoundError where there is none.
    """
    if not paths:
        raise ValueError("no data is given; name at least one file")
    examples = _read_files(paths, format, columns or {}, partial(_read, task=task))
    return examples[:limit] if limit else examples


def read_unlabelled(paths: Sequence[str], pairs: bool, columns: dict[str, str] | None = None) -> list[Text]:
    """Read texts, or ``pairs`` of texts: of SQuAD JSON all questions with their contexts.

    Labels and answers are not looked at. Raises as ``read_examples`` does, and ValueError for a single text where
    ``pairs`` are expected, or the other way round.
    """
    texts = _read_files(paths, "", columns or {}, _read_texts)
    for text in texts:
        if isinstance(text, tuple) != pairs:
            expected = "pairs, text_a and text_b (a question and its context)" if pairs else "single texts"
            raise ValueError(f"{', '.join(paths)} has {text!r}; expected {expected}, like the labelled data")
    return texts


def _read_files(
    paths: Sequence[str],
    format: str,
    columns: dict[str, str],
    read: Callable[[Path, str, dict[str, str]], Iterator[T]],
) -> list[T]:
    """What ``read`` finds in all files, each opened as its format."""
    for meaning in columns:
        if meaning not in COLUMNS:
            raise ValueError(f"columns names {meaning!r}; expected some of {', '.join(COLUMNS)}")
    rows: list[T] = []
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a file of {', '.join(FORMATS)}")
        kind = format or SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix, "")
        if kind not in FORMATS:
            raise ValueError(f"the format of {path} is {kind!r}; expected one of {', '.join(FORMATS)}")
        try:
            found = list(read(path, kind, columns))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        if not found:
            raise ValueError(f"{path} holds no rows in the format {kind}")
        rows += found
    return rows


def examples_of(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Read the training and the development examples of a recipe; ValueError where they can't be used.

    The training examples end with those without labels, which are never held out.
    """
    data = recipe.data
    training = read_examples(data.train, recipe.task, data.format, data.columns, data.limit)
    if recipe.task == "sequence_classification":
        training = [e for e in training if isinstance(e, LabelledText)]
    check_examples(training, recipe.task, ", ".join(data.train))
    pairs = any(isinstance(e, Span) or (isinstance(e, LabelledText) and isinstance(e.text, tuple)) for e in training)
    unlabelled = read_unlabelled(data.unlabelled, pairs, data.columns)
    if data.development:
        development = read_examples(data.development, recipe.task, data.development_format, data.columns)
    else:
        training, development = hold_out(training, HELD_OUT, recipe.seed)
        development = development[:MOST_SCORED]
    return [*training, *unlabelled], development


def check_examples(examples: Sequence[Example], task: Task, source: str) -> None:
    """Refuse data that no model for ``task`` can be trained on."""
    if len(examples) < LEAST:
        raise ValueError(f"{source} has {len(examples)} rows for {task}; expected at least {LEAST}")
    if task.endswith("classification"):
        counts = Counter(label for e in examples for label in labels_of(e))
        if len(counts) < 2:
            raise ValueError(f"{source} has a single label, {next(iter(counts))!r}; expected at least 2")


def labels_of(example: Example) -> tuple[str, ...]:
    """Labels that an example has."""
    if isinstance(example, LabelledText):
        return (example.label,)
    return example.tags if isinstance(example, TaggedWords) else ()


def all_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """Every label, sorted; numbers by value."""
    labels = {label for e in examples for label in labels_of(e)}
    return tuple(
        sorted(labels, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))
    )


def texts_of(examples: Sequence[Example]) -> list[Text]:
    """The texts of examples, without labels, each once."""
    texts: list[Text] = []
    for e in examples:
        if isinstance(e, ScoredPair):
            texts += [e.first, e.second]
        elif isinstance(e, LabelledText):
            texts.append(e.text)
        elif isinstance(e, TaggedWords):
            texts.append(" ".join(e.words))
        elif isinstance(e, Span):
            texts.append((e.question, e.context))
        else:
            texts.append(e)
    return list(dict.fromkeys(texts))


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and development examples by a seed; questions by article: no context is on both sides."""
    groups: dict[Any, list[Example]] = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.article if isinstance(e, Span) else i, []).append(e)
    order = sorted(groups, key=str)
    random.Random(seed).shuffle(order)
    if len(order) < 2:
        raise ValueError(f"all {len(examples)} questions are of one article; name development data of another")
    count = max(1, round(share * len(order)))
    development = {id(e) for key in order[:count] for e in groups[key]}
    return [e for e in examples if id(e) not in development], [e for e in examples if id(e) in development]


def _read_texts(path: Path, kind: str, columns: dict[str, str]) -> Iterator[Text]:
    if kind == "squad":
        yield from _read_squad(path, lambda _, context, qa: (str(qa["question"]), context))
        return
    for e in _read(path, kind, columns, "embedding"):
        if isinstance(e, ScoredPair):
            yield e.first, e.second
        else:
            yield from texts_of([e])


def _read(path: Path, kind: str, columns: dict[str, str], task: Task) -> Iterator[Example]:
    if task == "question_answering":
        if kind != "squad":
            raise ValueError(f"{path} is {kind}; question_answering needs SQuAD JSON")
        yield from _read_squad(path, partial(_span, path))
    elif kind == "texts":
        if task != "embedding":
            raise ValueError(f"{path} holds plain texts; {task} needs labels")
        yield from (line for _, line in _lines(path))
    elif kind in ("csv", "tsv", "jsonl"):
        yield from (_example(record, task, columns, where) for record, where in _records(path, kind))
    else:
        for row in read_dataset(path, kind).rows:
            if isinstance(row, Question):
                yield row.question
                yield row.context
            elif task == "embedding" or isinstance(row, SCORED[task]):
                yield row
            else:
                raise ValueError(f"{path} holds {kind} rows; they are no data for {task}")


def _example(record: dict[str, Any], task: Task, columns: dict[str, str], where: str) -> Example:
    def get(meaning: str) -> Any:
        return record.get(columns.get(meaning, meaning))

    def text(meaning: str) -> str:
        value = get(meaning)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {columns.get(meaning, meaning)} is {value!r}; expected a text")
        return value

    pair = columns.get("text_a", "text_a") in record
    if task == "token_classification":
        words, tags = get("words"), get("tags")
        words, tags = (v.split() if isinstance(v, str) else v for v in (words, tags))
        if not isinstance(words, list) or not isinstance(tags, list) or not words or len(words) != len(tags):
            names = [columns.get(name, name) for name in ("words", "tags")]
            raise ValueError(f"{where}: expected as many {names[1]} as {names[0]}, lists or divided by spaces")
        return TaggedWords(tuple(map(str, words)), tuple(map(str, tags)))
    if not pair and columns.get("text", "text") not in record:
        raise ValueError(
            f"{where} has the columns {', '.join(map(str, record))}; expected text, or text_a and text_b "
            "(other names are given by columns)"
        )
    if task == "sequence_classification":
        label = get("label")
        if label is None or str(label) == "":
            raise ValueError(
                f"{where} has the columns {', '.join(map(str, record))}; expected a {columns.get('label', 'label')} "
                "(another name is given by columns)"
            )
        return LabelledText((text("text_a"), text("text_b")) if pair else text("text"), str(label))
    if pair and get("score") not in (None, ""):
        try:
            return ScoredPair(text("text_a"), text("text_b"), float(get("score")))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return ScoredPair(text("text_a"), text("text_b"), float("nan")) if pair else text("text")


def _records(path: Path, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows as dictionaries, each with its place."""
    if kind == "jsonl":
        for i, line in _lines(path):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{i} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{i} is a JSON {type(record).__name__}; expected an object")
            yield record, f"{path}:{i}"
        return
    with _open(path) as file:
        # Quotes mean nothing where tabs divide fields, as in GLUE.
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
        reader = csv.DictReader(file, **options)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise ValueError(f"{where} has another number of fields than the header")
                yield record, where
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _read_squad(path: Path, make: Callable[[dict[str, Any], str, dict[str, Any]], T | None]) -> Iterator[T]:
    """What ``make`` makes of each article, context and question of SQuAD JSON."""
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    made = make(article, paragraph["context"], qa)
                    if made is not None:
                        yield made
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not SQuAD JSON ({type(error).__name__}: {error})") from error


def _span(path: Path, article: dict[str, Any], context: str, qa: dict[str, Any]) -> Span | None:
    """A question with its first answer's place; None where it has no answer."""
    if not qa["answers"] or qa.get("is_impossible", False):
        return None
    answer = qa["answers"][0]
    start = int(answer["answer_start"])
    end = start + len(answer["text"])
    if context[start:end] != answer["text"]:
        raise ValueError(f"{path}: the answer of question {qa['id']} does not stand at {start}")
    return Span(qa["question"], context, start, end, str(article.get("title", "")) or context)


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty."""
    with _open(path) as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                yield i, line.strip()
