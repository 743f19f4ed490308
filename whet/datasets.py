"""Readers of labelled data: STS-B, SST-2, SQuAD and CoNLL as they are published, and CSV files with a header.

A reader takes a path and returns rows of one kind; :mod:`whet.evaluate` scores each kind in its own way.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from whet.files import read_text

Text: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class ScoredPair:
    """Two texts and how similar people find them, on any scale."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair that is read together, and the name or number of its class."""

    text: Text
    label: str


@dataclass(frozen=True)
class Question:
    """A question whose answer stands in the context, with the answers that people gave."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TaggedWords:
    """Words and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


Row: TypeAlias = ScoredPair | LabelledText | Question | TaggedWords


@dataclass(frozen=True)
class Dataset:
    """Rows, all of one kind, and what a reader left out."""

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()


def read_dataset(path: str | PathLike[str], format: str, limit: int | None = None) -> Dataset:
    """Read a file in one of ``FORMATS``; ``limit`` keeps the first rows only.

    Raises:
        ValueError: an unknown format, or a file that does not have it; the message names the line.
        FileNotFoundError: no such file.

    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    path = Path(path)
    try:
        data = FORMATS[format](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not data.rows:
        raise ValueError(f"{path} holds no rows in the format {format}")
    if limit is None or limit >= len(data.rows):
        return data
    return Dataset(data.rows[:limit], (*data.notes, f"the first {limit} of {len(data.rows)} rows"))


def read_texts(path: str | PathLike[str], pairs: bool = False) -> list[Text]:
    """Read one text per line, empty lines left out; with ``pairs``, a tab divides a line into two texts.

    Raises:
        ValueError: the file is not UTF-8, or a line has several tabs.
        FileNotFoundError: no such file.

    """
    lines = read_text(Path(path)).splitlines()
    kept = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    return [split_pair(line, f"{path}:{i}") if pairs and "\t" in line else line for i, line in kept]


def split_pair(line: str, where: str) -> tuple[str, str]:
    """Split two texts at the tab between them."""
    parts = line.split("\t")
    if len(parts) != 2:
        raise ValueError(f"{where} has {len(parts) - 1} tabs; expected two texts with one tab between them")
    return parts[0], parts[1]


def read_stsb(path: Path) -> Dataset:
    """STS-B: the benchmark's own files (score in column 5, texts in 6 and 7, no header) or GLUE's ``.tsv`` (a header).

    Fields are tab-separated and quotes mean nothing (Cer et al. 2017; Wang et al. 2019).
    """
    lines = _lines(path)
    header = lines[0][1].split("\t") if lines else []
    if {"sentence1", "sentence2", "score"} <= set(header):
        lines, columns = lines[1:], tuple(header.index(name) for name in ("sentence1", "sentence2", "score"))
    else:
        columns = (5, 6, 4)
    rows = []
    for i, line in lines:
        fields = line.split("\t")
        if len(fields) <= max(columns):
            raise ValueError(f"{path}:{i} has {len(fields)} tab-separated fields; expected at least {max(columns) + 1}")
        first, second, score = (fields[c] for c in columns)
        rows.append(ScoredPair(first, second, _number(score, f"{path}:{i}: the score")))
    return Dataset(rows)


def read_sst2(path: Path) -> Dataset:
    """SST-2 as GLUE has it: tab-separated, quotes mean nothing, a header naming ``sentence`` and ``label``."""
    lines = _lines(path)
    header = lines[0][1].split("\t") if lines else []
    if not {"sentence", "label"} <= set(header):
        raise ValueError(f"{path}:1 is {header}; expected a header with the columns sentence and label")
    text, label = header.index("sentence"), header.index("label")
    rows = []
    for i, line in lines[1:]:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{path}:{i} has {len(fields)} tab-separated fields; the header has {len(header)}")
        rows.append(LabelledText(fields[text], fields[label].strip()))
    return Dataset(rows)


def read_squad(path: Path) -> Dataset:
    """SQuAD v1.1 or 2.0 JSON; of 2.0, only questions that have an answer, since v1.1's scores are about those.

    Format: Rajpurkar et al. 2016 and 2018.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        questions = [
            (qa, paragraph["context"])
            for article in document["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        rows = [
            Question(str(qa["id"]), qa["question"], context, tuple(a["text"] for a in qa["answers"]))
            for qa, context in questions
            if qa["answers"] and not qa.get("is_impossible", False)
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not SQuAD JSON ({type(error).__name__}: {error})") from error
    left_out = len(questions) - len(rows)
    notes = (f"{left_out} of {len(questions)} questions have no answer and are left out",) if left_out else ()
    return Dataset(rows, notes)


def read_conll(path: Path) -> Dataset:
    """CoNLL: a word per line with its tag in the last column, an empty line after each sentence.

    Columns are divided by tabs or, where a line has none, by spaces (Tjong Kim Sang and De Meulder 2003).
    """
    rows: list[TaggedWords] = []
    sentence: list[list[str]] = []
    for i, line in enumerate([*read_text(path).split("\n"), ""], 1):
        fields = line.strip().split("\t") if "\t" in line.strip() else line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2 or not fields[0] or not fields[-1]:
                raise ValueError(f"{path}:{i} is {line!r}; expected a word and, in the last column, its tag")
            sentence.append(fields)
        elif sentence:
            rows.append(TaggedWords(tuple(f[0] for f in sentence), tuple(f[-1] for f in sentence)))
            sentence = []
    return Dataset(rows)


def read_csv(path: Path) -> Dataset:
    """CSV with a header: ``text,label``, ``text_a,text_b,label`` or ``text_a,text_b,score``; others are ignored."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = set(reader.fieldnames or ())
        make = _csv_row(names, path)
        rows = []
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if any(value is None for value in record.values()):
                    raise ValueError(f"{where} has fewer fields than the header")
                rows.append(make(record, where))
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return Dataset(rows)


def _csv_row(names: set[str], path: Path) -> Callable[[dict[str, str], str], Row]:
    if {"text", "label"} <= names:
        return lambda r, _: LabelledText(r["text"], r["label"])
    if {"text_a", "text_b", "label"} <= names:
        return lambda r, _: LabelledText((r["text_a"], r["text_b"]), r["label"])
    if {"text_a", "text_b", "score"} <= names:
        return lambda r, where: ScoredPair(r["text_a"], r["text_b"], _number(r["score"], f"{where}: the score"))
    raise ValueError(
        f"{path}:1 has the columns {', '.join(sorted(names)) or 'none'}; expected text,label or text_a,text_b,label "
        "or text_a,text_b,score"
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are not empty. Only newlines end one: texts hold other separators."""
    text = path.read_text(encoding="utf-8-sig")
    return [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _number(text: Any, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}; expected a number") from None


FORMATS: dict[str, Callable[[Path], Dataset]] = {
    "stsb": read_stsb,
    "sst2": read_sst2,
    "squad": read_squad,
    "conll": read_conll,
    "csv": read_csv,
}
