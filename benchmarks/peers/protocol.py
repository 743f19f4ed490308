"""What every worker does: one engine with one model, driven by JSON lines, so that engines can take turns.

    python -m peers.ENGINE MODEL VARIANT THREADS CPU,CPU…

The answers to the driver's lines go to the file that was stdout; what the engine prints goes to stderr.

    {"do": "open", "requests": [tokens, …], "plan": [[request, …], …], "output": PATH} → {"seconds": of one pass}
    {"do": "burst", "runs": N, "settle": whether one before them is not timed, "clock": one of CLOCKS}
        → {"seconds": [of each pass]}
    {"do": "close"} → {}

A plan says which requests go to the engine together, padded to the longest of them; a pass runs all of it. What goes
wrong is answered as {"error": REASON}, and the worker goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # numpy.typing would have every environment agree about numpy
Step = Callable[[], Any]
Bind = Callable[[Array, Array], Step]
"""From ids and mask, int64 (batch, sequence), to a function that runs them and returns (batch, sequence, channels)."""
Load = Callable[[Path, str, int], Bind]
"""From the model's folder, the variant and a number of threads; raises where the engine can't run it."""

FIRST_ID, LAST_ID = 1000, 30000
PR_SET_PDEATHSIG = 1
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What times passes: "cpu" counts the time that the process has the core, all of its threads together."""
WARM_UP_SECONDS = 0.2
MOST_WARM_UPS = 20


def serve(load: Load, release: str, forget: Callable[[], None] = lambda: None) -> None:
    """Answer the driver until it closes stdin; ``forget`` drops what an engine keeps of former shapes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    # A stopped process would not see that the driver is gone.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    folder, variant, threads, cpus = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    try:
        bind = load(Path(folder), variant, int(threads))
    except Exception as error:
        answer(error=reason(error))
        return
    answer(version=release)
    steps: list[Step] = []
    for line in sys.stdin:
        message = json.loads(line)
        try:
            match message["do"]:
                case "open":
                    steps = []  # before the next ones: engines hold memory
                    forget()
                    steps = [bind(*padded(message["requests"], part)) for part in message["plan"]]
                    np.save(message["output"], outputs(message["requests"], message["plan"], steps))
                    answer(seconds=warm_up(steps))
                case "burst":
                    if message["settle"]:
                        run(steps)
                    clock = CLOCKS[message["clock"]]
                    answer(seconds=[run(steps, clock) for _ in range(message["runs"])])
                case "close":
                    steps = []
                    answer()
        except Exception as error:
            steps = []
            answer(error=reason(error))


def padded(lengths: Sequence[int], part: Sequence[int]) -> tuple[Array, Array]:
    """Ids and mask of some requests; every worker makes the same ids."""
    shape = (len(part), max(lengths[i] for i in part))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, i in enumerate(part):
        ids[row, : lengths[i]] = np.random.default_rng(i).integers(FIRST_ID, LAST_ID, lengths[i])
        mask[row, : lengths[i]] = 1
    return ids, mask


def outputs(lengths: Sequence[int], plan: Sequence[Sequence[int]], steps: Sequence[Step]) -> Array:
    """Run once; float32 (tokens, channels) in the order of the requests, or (requests, channels)."""
    rows: dict[int, Array] = {}
    for part, step in zip(plan, steps, strict=True):
        result = np.array(step(), np.float32)  # a copy: engines write their next output to the same memory
        for i, row in zip(part, result, strict=True):
            rows[i] = row[: lengths[i]] if result.ndim == 3 else row[None]
    return np.concatenate([rows[i] for i in range(len(lengths))])


def run(steps: Sequence[Step], clock: Callable[[], float] = CLOCKS["wall"]) -> float:
    """Seconds of one pass."""
    start = clock()
    for step in steps:
        step()
    return clock() - start


def warm_up(steps: Sequence[Step]) -> float:
    """Run until caches, clocks and just-in-time compilers have settled; the fastest pass."""
    seconds = [run(steps)]
    while sum(seconds) < WARM_UP_SECONDS and len(seconds) < MOST_WARM_UPS:
        seconds.append(run(steps))
    return min(seconds)


def reason(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
