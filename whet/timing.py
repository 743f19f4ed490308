"""How long something takes on a machine that others use, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

REPEATS = 5


def least_times(steps: Sequence[Callable[[], object]]) -> list[float]:
    """Least CPU time of each of some runs of each step, in seconds; the steps take turns.

    Of CPU: how busy others keep the core must not decide anything.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(REPEATS):
        for step, taken in zip(steps, times, strict=True):
            start = time.thread_time()
            step()
            taken.append(time.thread_time() - start)
    return [min(taken) for taken in times]
