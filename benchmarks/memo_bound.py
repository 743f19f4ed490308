"""What a module with records can gain at most: times where no request uses one, and where all do, found for free.

    python benchmarks/memo_bound.py plain.so memo.so TOKENS [TOKENS …]

Both are compiled from the same model, memo.so with --memo. Records are read from memory: each call uses another copy.
Times are CPU time of single requests on one thread, medians, the modules in turns; pin the process to a core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

import whet
from whet.runtime.packing import aligned

SECONDS, LEAST, COPIES_BYTES = 8.0, 15, 400_000_000


def main() -> None:
    """Print a row of a table for each number of tokens."""
    plain, memo = (whet.load(path, threads=1) for path in sys.argv[1:3])
    records = memo.metadata.records
    if records is None:
        raise ValueError(f"{sys.argv[2]} uses no records; compile it with --memo")
    print("| tokens | record, KB | plain, ms | no record used | all use one |\n|---|---|---|---|---|")
    for tokens in map(int, sys.argv[3:]):
        ids = np.random.default_rng(0).integers(0, plain.metadata.vocab_size, tokens).astype(np.int32)
        length, positions = np.array([tokens]), np.arange(tokens)
        size = records.size(tokens)
        copies = aligned((max(2, COPIES_BYTES // size), size), np.uint8)
        address = int(copies.__array_interface__["data"][0])
        memo.run_recorded(ids, length, positions, None, np.array([[0, address]]))
        copies[1:] = copies[0]
        turn = 0

        def hit() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            nonlocal turn
            turn = (turn + 1) % len(copies)  # noqa: B023 - called before the next round
            return memo.run_recorded(ids, length, positions, None, np.array([[address + turn * size, 0]]))  # noqa: B023

        steps: list[Callable[[], object]] = [
            lambda: plain.run_packed(ids, length),  # noqa: B023
            lambda: memo.run_packed(ids, length),  # noqa: B023
            hit,
        ]
        if not all(np.array_equal(np.asarray(step()), np.asarray(steps[0]())) for step in steps):
            raise ValueError("the answers differ")
        times = _times(steps)
        ratios = " | ".join(f"{t / times[0]:.3f}" for t in times[1:])
        print(f"| {tokens} | {size // 1024} | {times[0] * 1e3:.2f} | {ratios} |", flush=True)


def _times(steps: list[Callable[[], object]]) -> list[float]:
    """Median CPU seconds of each."""
    taken: list[list[float]] = [[] for _ in steps]
    while sum(map(sum, taken)) < SECONDS or len(taken[0]) < LEAST:
        for step, seconds in zip(steps, taken, strict=True):
            start = time.thread_time()
            step()
            seconds.append(time.thread_time() - start)
    return [float(np.median(seconds)) for seconds in taken]


if __name__ == "__main__":
    main()
