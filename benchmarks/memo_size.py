"""How a memo file's hits, and what they save, grow with the number of its records: a table and a picture.

    python benchmarks/compression_data.py DATA OUT                                   # OUT/questions.txt
    sed -n 3001,11000p OUT/questions.txt > corpus.txt; tail -n 2000 OUT/questions.txt > held-out.txt
    whet compile MODEL -o m.so --memo
    whet memo build m.so --corpus corpus.txt --held-out held-out.txt --memory 2GiB -o m.memo
    python benchmarks/memo_size.py NAME m.so m.memo OUT/questions.txt                # writes results/NAME.md and .svg

``m.memo`` gives the keys and distances of the levels, and of each length what a request and a hit take; the texts are
in random order: the first ``QUERIES`` are asked, the others are the records. A record's attention is not made: hits
follow from the tokens alone. A look-up's time is the CPU time of one thread; pin the process to a core. Needs
matplotlib.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import table

import whet
from whet.memoizing import Bucket, inspect
from whet.runtime import Session
from whet.runtime.memo import LEVELS, Memo
from whet.runtime.memo_file import MemoFile, create

RESULTS = Path(__file__).parent / "results"
SIZES = (1000, 3000, 10_000, 30_000, 100_000)
QUERIES = 3000


def main() -> None:
    """Read, count, write, draw."""
    name, module, memo, texts = sys.argv[1:]
    session, report = whet.load(module, threads=1), inspect(memo)
    lines = Path(texts).read_text(encoding="utf-8").splitlines()[: QUERIES + SIZES[-1]]
    requests = session.requests(lines)
    rows = []
    for n in SIZES:
        with records(session, MemoFile(memo), requests[QUERIES : QUERIES + n]) as path:
            memos = {level: session.open_memo(path, level=level) for level in LEVELS}
            rows.append(measure(memos, requests[:QUERIES], report.buckets))
    head = ["records", "MB", *(f"hit, {level}" for level in LEVELS), "µs of a look-up", "µs saved per request, default"]
    body = [
        [
            f"{n:,}",
            f"{row['bytes'] / 1e6:.0f}",
            *(f"{row[level]:.1%}" for level in LEVELS),
            f"{row['look_up']:.0f}",
            f"{row['saved']:+.0f}",
        ]
        for n, row in zip(SIZES, rows, strict=True)
    ]
    lost = ", ".join(f"{report.loss[level]:.2f} at {level}" for level in LEVELS)
    parts = [
        "# Records of a memo file against hits and saving",
        f"`python benchmarks/memo_size.py {name} {Path(module).name} {Path(memo).name} {Path(texts).name}`, "
        f"{QUERIES} requests. Points lost by the requests held out when the file was built, of {report.count} records: "
        f"{lost}.",
        table(head, body),
        f"![hits and saving by the number of records]({name}.svg)",
    ]
    (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(rows, RESULTS / f"{name}.svg")


@contextmanager
def records(session: Session, like: MemoFile, requests: Sequence[NDArray[np.int32]]) -> Iterator[Path]:
    """Make a memo file of requests, with nothing for attention, that looks up at all lengths."""
    description = replace(like.description, capacity=len(requests), pays={level: [[1, 1 << 16]] for level in LEVELS})
    needed = sum(description.record_size(tokens.shape[1]) for tokens in requests)
    description = replace(description, size=description.first_record + needed)
    with TemporaryDirectory(prefix="whet-memo-size-") as folder:
        path = Path(folder) / "a.memo"
        create(path, description, like.vectors)
        memo = session.open_memo(path, grow=True)
        for tokens in requests:
            memo.file.add(tokens, memo.keys_of(tokens))
        yield path


def measure(memos: dict[str, Memo], asked: Sequence[NDArray[np.int32]], buckets: Sequence[Bucket]) -> dict[str, float]:
    """Shares of hits by level, bytes, mean microseconds of a look-up, and those saved per request."""
    description = memos["default"].file.description
    hits = dict.fromkeys(LEVELS, 0)
    seconds, saved = [], 0.0
    for tokens in asked:
        length = tokens.shape[1]
        start = time.thread_time()
        memos["default"].find(tokens[0], tokens[1], np.array([length]))
        seconds.append(time.thread_time() - start)
        near = {level: memo.nearest(tokens)[1] <= description.levels[level] for level, memo in memos.items()}
        for level, hit in near.items():
            hits[level] += hit
        if near["default"]:
            bucket = next((b for b in buckets if b.lengths[0] <= length <= b.lengths[1]), buckets[-1])
            saved += bucket.plain - bucket.hit
    look_up = float(np.mean(seconds)) * 1e6
    return {
        **{level: hits[level] / len(asked) for level in LEVELS},
        "bytes": float(description.size - description.first_record),
        "look_up": look_up,
        "saved": saved / len(asked) - look_up,
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Hits by level, and microseconds, against the number of records."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for level in LEVELS:
        left.plot(SIZES, [100 * row[level] for row in rows], marker="o", label=level)
    left.set(xscale="log", xlabel="records", ylabel="requests that hit, %")
    right.plot(SIZES, [row["look_up"] for row in rows], marker="o", label="a look-up takes")
    right.plot(SIZES, [row["saved"] for row in rows], marker="o", label="saved per request, default")
    right.axhline(0, color="black", linewidth=0.5)
    right.set(xscale="log", xlabel="records", ylabel="µs")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
