"""Requests of no class beside requests of some: who leaves early, and how sure their answers look.

    python benchmarks/out_of_scope.py test.csv outside.txt plain.so frozen.so …

``test.csv`` has requests of the classes, ``text,label``; ``outside.txt`` a request of no class per line. The modules
are of one model, plain first, then with caches.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import table

import whet
from whet.datasets import LabelledText, read_dataset, read_texts
from whet.runtime.spans import softmax

LEVELS = (0.5, 0.9)
"""Probabilities that an answer may have to reach."""
PASSED = (0.98, 0.95, 0.9)
"""Shares of the requests with a class that shall reach a level chosen for it."""


def main() -> None:
    """Print a table with a column for each module."""
    data, texts, *paths = sys.argv[1:]
    inside = [row.text for row in read_dataset(data, "csv").rows if isinstance(row, LabelledText)]
    outside = read_texts(texts)
    columns = []
    plain: NDArray[Any] | None = None
    for path in paths:
        session = whet.load(path, threads=1)
        known, strange = (softmax(session.logits(some)) for some in (inside, outside))
        plain = strange if plain is None else plain
        column = [f"{(strange.argmax(axis=1) == plain.argmax(axis=1)).mean():.1%}"]
        exits = session.metadata.exits
        column.insert(0, f"{(session.trace(outside).layers == exits[-1]).mean():.1%}" if exits else "–")
        columns.append(column + _surety(known.max(axis=1), strange.max(axis=1)))
    names = ["run to the end", "get the first module's answer"]
    names += [f"probability of at least {level} (of some class)" for level in LEVELS]
    names += [f"pass a level that {share:.0%} of some class pass" for share in PASSED]
    names += ["area under the ROC curve of the largest probability"]
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    print(table(["requests of no class", *paths], rows))


def _surety(known: NDArray[Any], strange: NDArray[Any]) -> list[str]:
    """What the largest probabilities of both kinds of requests say."""
    shares = [f"{(strange >= level).mean():.1%} ({(known >= level).mean():.1%})" for level in LEVELS]
    shares += [f"{(strange >= np.quantile(known, 1 - share)).mean():.1%}" for share in PASSED]
    return [*shares, f"{_roc_area(known, strange):.3f}"]


def _roc_area(high: NDArray[Any], low: NDArray[Any]) -> float:
    """The chance that one of ``high`` is above one of ``low`` (Mann and Whitney's U, ties aside)."""
    ranks = np.argsort(np.argsort(np.concatenate([high, low])))[: len(high)]
    return float((ranks.mean() - (len(high) - 1) / 2) / len(low))


if __name__ == "__main__":
    main()
