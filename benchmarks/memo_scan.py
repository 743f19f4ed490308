"""How long the search in a memo file takes, by its records of one length: compiled, and the same scan in NumPy.

    python benchmarks/memo_scan.py m.so m.memo

``m.memo`` gives the vectors of words; the records are of random words, and have no attention. Prints a table, in
microseconds: medians of CPU time on one thread; pin the process to a core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from memo_size import records
from numpy.typing import NDArray
from report import table

import whet
from whet.runtime.memo_file import MemoFile

SIZES, TOKENS, ASKED = (100, 1000, 10_000, 100_000), 16, 50


def main() -> None:
    """Print a row for each number of records."""
    module, memo = sys.argv[1:]
    session = whet.load(module, threads=1)
    rng = np.random.default_rng(0)
    words = rng.integers(0, session.metadata.vocab_size, (SIZES[-1], 2, TOKENS)).astype(np.int32)
    words[:, 1] = 0
    rows = []
    for n in SIZES:
        with records(session, MemoFile(memo), list(words[:n])) as path:
            opened = session.open_memo(path)
            keys = opened.file.keys[0, :n]
            norms = np.einsum("nd,nd->n", keys, keys)
            asked = words[rng.integers(0, n, ASKED)]
            asked[:, 0, 0] = 1
            compiled = median([partial(opened.nearest, tokens) for tokens in asked])
            scan = median([partial(numpy_scan, keys, norms, opened.keys_of(tokens)[0]) for tokens in asked])
            rows.append([f"{n:,}", f"{compiled:.0f}", f"{scan:.0f}"])
    print(table(["records", "a search, with its key and the distance", "NumPy: the scan alone"], rows))


def numpy_scan(keys: NDArray[np.float32], norms: NDArray[np.float32], key: NDArray[np.float32]) -> int:
    """Number of the nearest key."""
    return int((norms - 2 * (keys @ key)).argmin())


def median(steps: list[Callable[[], object]]) -> float:
    """Microseconds."""
    times = []
    for step in steps * 3:
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    main()
