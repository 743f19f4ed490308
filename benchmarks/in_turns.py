"""Modules against each other: the CPU time of single requests, the modules in turns, in a new order each time.

    python benchmarks/in_turns.py a.so b.so …      # pin it to a core: taskset -c 1 …

A row per length that all can take: the median of each in milliseconds, and as a share of the first module's.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import whet

LENGTHS = (16, 32, 64, 128, 384)
ROUNDS = 60


def main() -> None:
    """Load, run in turns, print a table."""
    paths = sys.argv[1:]
    if len(paths) < 2:
        sys.exit(f"usage: {sys.argv[0]} A.so B.so …")
    sessions = [whet.load(path, threads=1) for path in paths]
    rng = np.random.default_rng(0)
    words = min(session.metadata.vocab_size for session in sessions)
    print(f"| tokens | {' | '.join(paths)} |\n|{'---|' * (1 + len(paths))}")
    longest = min(session.metadata.max_length for session in sessions)
    for length in (n for n in LENGTHS if n <= longest):
        ids = rng.integers(words, size=(1, length))
        taken = np.empty((ROUNDS, len(sessions)))
        for row in taken:
            for i in rng.permutation(len(sessions)):
                start = time.thread_time()
                sessions[i].run(ids)
                row[i] = time.thread_time() - start
        medians = 1e3 * np.median(taken, axis=0)
        print(f"| {length} | {' | '.join(f'{m:.3f} ({m / medians[0]:.3f})' for m in medians)} |")


if __name__ == "__main__":
    main()
