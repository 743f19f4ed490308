"""Caches that meet requests which they were not fitted on, with audits and without: thresholds, hits and accuracy.

    python benchmarks/drift.py MODEL train.csv dev.csv test.csv      # text,label

Caches are fitted on half of the model's classes. Then come requests of that half, from the middle on of all classes, to
three sessions: without caches, with caches, and with caches that are audited. In the end caches are fitted again, with
the requests that audits kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import whet
from whet.datasets import LabelledText, read_dataset
from whet.freezing import fit
from whet.metrics import class_of
from whet.progress import TerminalProgress

REQUESTS, WINDOW, AUDIT = 4000, 400, 0.1


def main() -> None:
    """Fit, serve, and print a line per window."""
    model, *files = sys.argv[1:]
    train, dev, test = ([r for r in read_dataset(f, "csv").rows if isinstance(r, LabelledText)] for f in files)
    rng = np.random.default_rng(0)
    known = set(rng.permutation(sorted({row.label for row in train}))[::2].tolist())
    halves = [[row for row in rows if row.label in known] for rows in (train, dev, test)]
    with TemporaryDirectory(prefix="whet-drift-") as folder:
        paths = [str(Path(folder) / name) for name in ("a.freeze", "plain.so", "frozen.so", "b.freeze", "again.so")]
        progress = TerminalProgress()
        print(fit(model, paths[0], halves[0], halves[1], progress=progress))
        whet.compile(model, paths[1], progress=progress)
        whet.compile(model, paths[2], freeze=paths[0], progress=progress)
        plain, frozen = (whet.load(path, threads=1) for path in paths[1:3])
        audited = whet.load(paths[2], threads=1, audit=AUDIT)
        before = [halves[2][i] for i in rng.integers(len(halves[2]), size=REQUESTS // 2)]
        after = [test[i] for i in rng.integers(len(test), size=REQUESTS // 2)]
        serve([*before, *after], plain, frozen, audited)
        served = f"{paths[2]}.audit"
        print(fit(model, paths[3], halves[0], served=served, progress=progress))
        whet.compile(model, paths[4], freeze=paths[3], progress=progress)
        again = whet.load(paths[4], threads=1)
        texts = [row.text for row in test]
        right = _classes(test, plain)
        for name, session in (("plain", plain), ("first caches", frozen), ("fitted again", again)):
            answers = session.logits(texts).argmax(axis=1)
            early = (session.trace(texts).layers < session.metadata.exits[-1]).mean() if session.metadata.exits else 0
            print(f"| {name} | {(answers == right).mean():.3f} | {early:.1%} |")


def serve(rows: list[LabelledText], plain: whet.Session, frozen: whet.Session, audited: whet.Session) -> None:
    """Let the sessions answer, window by window."""
    auditor, thresholds = audited.auditor, audited.thresholds
    assert auditor is not None and thresholds is not None
    print(f"an audit of {AUDIT:.0%} allows a loss of {audited.metadata.allowed_loss:.4f}")
    print("| requests | plain | caches | audited | leave early | audited loss | changes seen | thresholds |")
    print("|---|---|---|---|---|---|---|---|")
    for start in range(0, len(rows), WINDOW):
        part = rows[start : start + WINDOW]
        texts = [row.text for row in part]
        right = _classes(part, plain)
        answers = [int(audited.logits(text).argmax()) for text in texts]  # one by one: audits work beside them
        auditor.wait()
        leave = audited.trace(texts).layers < audited.metadata.exits[-1]
        scores = [(session.logits(texts).argmax(axis=1) == right).mean() for session in (plain, frozen)]
        scores.append((np.array(answers) == right).mean())
        numbers = " ".join("never" if t > 1e9 else f"{t:.3f}" for t in thresholds)
        accuracy = " | ".join(f"{score:.3f}" for score in scores)
        print(
            f"| {start + len(part)} | {accuracy} | {np.mean(leave):.1%} | {auditor.loss:.4f} | {auditor.changes} "
            f"| {numbers} |",
            flush=True,
        )


def _classes(rows: list[LabelledText], session: whet.Session) -> np.ndarray[Any, Any]:
    return np.array([class_of(r.label, session.metadata.labels, session.metadata.output.channels) for r in rows])


if __name__ == "__main__":
    main()
