"""What scores are made of: correlations, cosines, names of classes, words that answers share, stretches of tags."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def pearson(x: Array, y: Array) -> float:
    """Pearson correlation of two 1-D arrays.

    Raises:
        ValueError: fewer than 2 values, or one array is constant.

    """
    a, b = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if len(a) < 2 or spread == 0:
        raise ValueError("a correlation needs at least 2 rows that differ; take more rows")
    return float((a * b).sum() / spread)


def spearman(x: Array, y: Array) -> float:
    """Spearman correlation: Pearson's of the ranks, where ties have the mean of their ranks. Raises as ``pearson``."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Array) -> NDArray[np.float64]:
    """Rank every value from 1; equal values get the mean of the ranks they cover."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[group.reshape(-1)]
    return mean


def cosines(a: Array, b: Array) -> Array:
    """Cosine of each row of ``a`` with the same row of ``b``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, 1e-12))


def class_of(label: str, names: Sequence[str], classes: int) -> int:
    """Return the index of a class from its name (in any case) or its number.

    Raises:
        ValueError: it is neither.

    """
    if label in names:
        return names.index(label)
    folded = [name.casefold() for name in names]
    if folded.count(label.casefold()) == 1:
        return folded.index(label.casefold())
    if label.isdecimal() and int(label) < classes:
        return int(label)
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    raise ValueError(f"label {label!r} is none of the model's {classes} ({shown}), nor a number below {classes}")


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space, as SQuAD's script compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether two answers are the same after normalisation."""
    return normalise_answer(answer) == normalise_answer(gold)


def f1_score(answer: str, gold: str) -> float:
    """F1 of the words that two answers share, counted with repeats."""
    words, expected = normalise_answer(answer).split(), normalise_answer(gold).split()
    shared = sum((Counter(words) & Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected)) if shared else 0.0


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Stretches that tags mark, as kind, first and last word: of IOB1, IOB2 or BIOES, read as ``conlleval`` reads them.

    A stretch begins with B, S or U, and with I, E or L where none of its kind is open; E, S and L end it.
    """
    found = set()
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = kind and name == kind and prefix in ("I", "E", "L")
        if kind and not goes_on:
            found.add((kind, first, i - 1))
        if not goes_on:
            kind, first = (name, i) if prefix in ("B", "I", "E", "L", "S", "U") else ("", i)
        if kind and prefix in ("E", "L", "S", "U"):
            found.add((kind, first, i))
            kind = ""
    return found
