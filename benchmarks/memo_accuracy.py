"""Accuracy on labelled data with a memo file, at each level, and without.

    whet memo build memo.so --corpus train.txt --held-out development.txt --memory 4GiB -o m.memo
    python benchmarks/memo_accuracy.py m.memo memo.so test.csv csv       # also squad, sst2, …

Looks up at all lengths, whether it pays or not, in a copy of the file. Prints a table.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from near_duplicates import look_up_everywhere
from report import table

import whet
from whet.datasets import read_dataset
from whet.evaluate import evaluate
from whet.memoizing import inspect
from whet.runtime.memo import LEVELS


def main() -> None:
    """Score, level by level."""
    memo, module, data, format = sys.argv[1:]
    rows, names = [], []
    dataset = read_dataset(data, format)
    plain = whet.load(module, threads=1)
    report = inspect(memo)
    with TemporaryDirectory(prefix="whet-memo-accuracy-") as folder:
        path = Path(folder) / "a.memo"
        shutil.copy(memo, path)
        look_up_everywhere(path)
        for level in ("", *LEVELS):
            session = whet.load(module, threads=1, memo=path, memo_level=level) if level else plain
            found = evaluate(session, dataset, against=plain)
            hits = "–"
            if session.memo is not None:
                hits = f"{session.memo.hits / (session.memo.hits + session.memo.misses):.1%}"
            agreement = {k: v for k, v in found.against.items() if not k.endswith(("_other", "_difference"))}
            names = [*found.scores, *agreement]
            values = [f"{v:.4f}" for v in (*found.scores.values(), *agreement.values())]
            rows.append([level or "plain", report.keys_of.get(level, "–"), hits, *values])
    print(f"{report.count} records, {report.bytes / 1e6:.0f} MB; {len(dataset.rows)} rows\n")
    print(table(["level", "key", "hit", *names], rows))


if __name__ == "__main__":
    main()
