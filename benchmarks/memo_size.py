"""How a memo file's hits, and what they save, grow with the number of its records: a table and a picture.

    python benchmarks/memo_size.py NAME model.memo texts.txt TOKENIZER    # writes results/NAME.md and .svg

``model.memo`` gives the distances of the levels, and of each length what a request and a hit take; ``texts.txt`` has a
request per line, in random order: the first ``QUERIES`` are asked, the others are the records. A record's attention is
not made: hits follow from the tokens alone. A look-up's time is the CPU time of one thread. Needs matplotlib.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import table
from tokenizers import Tokenizer

from whet.memoizing import Bucket, inspect
from whet.runtime.memo import LEVELS, Keys
from whet.runtime.memo_file import MemoFile

RESULTS = Path(__file__).parent / "results"
SIZES = (1000, 3000, 10_000, 30_000, 100_000)
QUERIES = 3000


def main() -> None:
    """Read, count, write, draw."""
    name, memo, texts, tokenizer_file = sys.argv[1:]
    file = MemoFile(memo)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    lines = Path(texts).read_text(encoding="utf-8").splitlines()[: QUERIES + SIZES[-1]]
    requests = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(lines)]
    keys = Keys(file.vectors, 128)
    report = inspect(memo)
    rows = [measure(keys, requests[:QUERIES], requests[QUERIES : QUERIES + n], file, report.buckets) for n in SIZES]
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
        f"`python benchmarks/memo_size.py {name} {Path(memo).name} {Path(texts).name} tokenizer.json`; {report.name}, "
        f"{QUERIES} requests. Points lost by the requests held out when the file was built, of {report.count} records: "
        f"{lost}.",
        table(head, body),
        f"![hits and saving by the number of records]({name}.svg)",
    ]
    (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(rows, RESULTS / f"{name}.svg")


def measure(
    keys: Keys,
    asked: list[NDArray[np.int32]],
    records: list[NDArray[np.int32]],
    file: MemoFile,
    buckets: tuple[Bucket, ...],
) -> dict[str, float]:
    """Shares of hits by level, bytes, mean microseconds of a look-up, and those saved per request."""
    of_length: dict[int, list[NDArray[np.int32]]] = defaultdict(list)
    for ids in records:
        of_length[len(ids)].append(ids)
    index: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for length, group in of_length.items():
        matrix = np.stack([keys.key(ids) for ids in group])
        index[length] = matrix, np.einsum("nd,nd->n", matrix, matrix)
    levels = file.description.levels
    hits = dict.fromkeys(LEVELS, 0)
    seconds, saved = [], 0.0
    for ids in asked:
        start = time.thread_time()
        distance = np.inf
        if len(ids) in index:
            matrix, norms = index[len(ids)]
            distance = keys.distance(ids, of_length[len(ids)][int((norms - 2 * (matrix @ keys.key(ids))).argmin())])
        seconds.append(time.thread_time() - start)
        for level in LEVELS:
            hits[level] += distance <= levels[level]
        if distance <= levels["default"]:
            bucket = next((b for b in buckets if b.lengths[0] <= len(ids) <= b.lengths[1]), buckets[-1])
            saved += bucket.plain - bucket.hit
    look_up = float(np.mean(seconds)) * 1e6
    made: dict[str, float] = {level: hits[level] / len(asked) for level in LEVELS}
    size = float(sum(file.description.record_size(len(ids)) for ids in records))
    return {**made, "bytes": size, "look_up": look_up, "saved": saved / len(asked) - look_up}


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
