"""What caches gain: a classifier's module with them beside the same without, request by request in turns.

    python benchmarks/freeze.py plain.so frozen.so test.csv      # text,label

Times are of single requests, tokenising included, on one thread; pin the process to a core.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import whet
from whet.datasets import LabelledText, read_dataset
from whet.evaluate import class_of

TIMED, REPEATS = 600, 5


def main() -> None:
    """Compare two modules on a labelled file."""
    paths, data = sys.argv[1:3], sys.argv[3]
    plain, frozen = (whet.load(path, threads=1) for path in paths)
    rows = [row for row in read_dataset(data, "csv").rows if isinstance(row, LabelledText)]
    texts = [row.text for row in rows]
    answers = [session.logits(texts) for session in (plain, frozen)]
    classes = answers[0].shape[1]
    labels = np.array([class_of(row.label, plain.metadata.labels, classes) for row in rows])
    for name, logits in zip(("plain", "with caches"), answers, strict=True):
        print(f"{name}: accuracy {(logits.argmax(axis=1) == labels).mean():.4f} of {len(rows)}")
    stayed = (answers[0] == answers[1]).all(axis=1)  # to the bit: who left was answered by a cache
    print(f"leave early: {1 - stayed.mean():.1%}")
    times = np.array([[_seconds(session, text) for session in (plain, frozen)] for text in texts[:TIMED]])
    for name, values in (
        ("mean", times.mean(axis=0)),
        ("median", np.median(times, axis=0)),
        ("95th percentile", np.percentile(times, 95, axis=0)),
        ("of those that stay, mean", times[stayed[:TIMED]].mean(axis=0)),
    ):
        print(f"time, {name}: {values[0] * 1e6:.0f} µs, {values[1] / values[0]:.2f} of it with caches")


def _seconds(session: whet.Session, text: str | tuple[str, str]) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        session.logits([text])
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
