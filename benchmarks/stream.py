"""A stream of single requests answered in four ways: plain, with caches, with records, with both.

    python benchmarks/stream.py stream.csv plain.so frozen.so memo.so both.so a.memo [LEVEL]

The modules are of one model: plain, ``--freeze``, ``--memo``, and both; one file of ``whet memo build`` serves the last
two. Requests, ``text,label`` or a text per line, come one by one, each once, as they do to a service: all are looked
up, whether building found that this pays or not, and those that find no record add theirs, to copies of the file. Times
are CPU time on one thread, tokenising included, the sessions in turns, each time in another order; pin the process to a
core.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import whet
from whet.datasets import LabelledText, read_dataset, read_texts
from whet.metrics import class_of
from whet.progress import TerminalProgress
from whet.runtime.memo_file import MemoFile, describe
from whet.runtime.text import Text

WARM = 20
"""Requests, of the stream's end, that sessions without records answer before times are taken."""


@dataclass(frozen=True)
class Answer:
    """Of one session to one request."""

    milliseconds: float
    label: int
    layers: int


def main() -> None:
    """Run the stream and print a table."""
    stream, *modules = sys.argv[1:6]
    texts, labels = requests(stream)
    with sessions(modules, *sys.argv[6:]) as opened:
        report(opened, serve(texts, opened), labels)


def requests(path: str) -> tuple[list[Text], list[str]]:
    """Texts and, of a CSV file, labels."""
    if not path.endswith(".csv"):
        return read_texts(path), []
    rows = [row for row in read_dataset(path, "csv").rows if isinstance(row, LabelledText)]
    return [row.text for row in rows], [row.label for row in rows]


@contextmanager
def sessions(paths: Sequence[str], memo: str, level: str = "default") -> Iterator[dict[str, whet.Session]]:
    """Load plain, frozen, memo and both."""
    with TemporaryDirectory(prefix="whet-stream-") as folder:
        opened = {}
        for name, path in zip(("plain", "freeze", "memo", "both"), paths, strict=True):
            options: dict[str, Any] = {}
            if name in ("memo", "both"):
                copy = Path(folder) / name
                shutil.copy(memo, copy)
                description = MemoFile(copy).description
                describe(copy, replace(description, pays={level: [[1, description.size]]}))
                options = {"memo": copy, "memo_level": level, "memo_grow": True}
            opened[name] = whet.load(path, threads=1, **options)
        yield opened


def serve(texts: Sequence[Text], opened: Mapping[str, whet.Session]) -> dict[str, list[Answer]]:
    """Let all sessions answer all texts."""
    answers: dict[str, list[Answer]] = {name: [] for name in opened}
    for name in ("plain", "freeze"):
        for text in texts[-WARM:]:
            answer(opened[name], text)
    rng = np.random.default_rng(0)
    with TerminalProgress().phase("run the stream", len(texts)) as advance:
        for i, text in enumerate(texts):
            for name in rng.permutation(list(opened)).tolist():
                answers[name].append(answer(opened[name], text))
            advance(i + 1)
    return answers


def answer(session: whet.Session, text: Text) -> Answer:
    """Answer one request."""
    start = time.thread_time()
    if session.metadata.exits:
        logits, layers, _ = session.trace([text])
    else:
        logits, layers = session.logits([text]), np.array([-1])
    return Answer(1e3 * (time.thread_time() - start), int(logits.argmax()), int(layers[0]))


def report(opened: Mapping[str, whet.Session], answers: Mapping[str, Sequence[Answer]], labels: Sequence[str]) -> None:
    """Print a row of a table for each session."""
    classes = {name: np.array([a.label for a in some]) for name, some in answers.items()}
    metadata = opened["plain"].metadata
    right = np.array([class_of(label, metadata.labels, metadata.output.channels) for label in labels])
    head = ["", "mean, ms", "p50", "p95", *["accuracy"] * bool(labels), "as plain", "use a record", "leave early"]
    print(f"| {' | '.join([*head, 'layers'])} |\n|{'---|' * (len(head) + 1)}")
    for name, session in opened.items():
        times = np.array([a.milliseconds for a in answers[name]])
        layers = np.array([a.layers for a in answers[name]])
        cells = [name, *(f"{t:.2f}" for t in (times.mean(), *np.percentile(times, [50, 95])))]
        if labels:
            cells.append(f"{(classes[name] == right).mean():.4f}")
        cells.append(f"{(classes[name] == classes['plain']).mean():.4f}")
        cells.append("–" if session.memo is None else f"{session.memo.hits / len(times):.1%}")
        exits = session.metadata.exits
        cells += [f"{(layers < exits[-1]).mean():.1%}", f"{layers.mean():.2f}"] if exits else ["–", "–"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
