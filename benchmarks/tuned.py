"""What tuning gains in a whole model: the module with records and the one without, in turns, on one thread.

    python benchmarks/tuned.py MODEL RECORDS [ISA]     # one JSON object

Both must answer the same; only float32 layers sum in another order. Records that ship with Whet are left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import whet
from whet.runtime.cpu import cpu_model
from whet.tune import records
from whet.tune.machine import cpu_type

TOKENS = (16, 32, 128, 384)
ROUNDS, SAMPLE_SECONDS = 41, 0.02
TOLERANCE = 1e-5
"""Of the largest value."""


def main() -> None:
    """Compile twice, compare."""
    model, folder, *isa = sys.argv[1:]
    options: dict[str, Any] = {"isa": isa[0]} if isa else {}
    found = {}
    with tempfile.TemporaryDirectory() as work:
        nothing = Path(work) / "nothing"
        nothing.mkdir()
        records.SHIPPED = nothing
        sessions = []
        for name, given in (("plain", nothing), ("tuned", folder)):
            path = Path(work) / f"{name}.so"
            report = whet.compile(model, path, records=given, **options)
            sessions.append(whet.load(path, threads=1))
        longest = sessions[0].metadata.max_length
        for tokens in dict.fromkeys(min(t, longest) for t in TOKENS):
            found[tokens] = compare([call(session, tokens) for session in sessions])
    document = {
        "command": "python benchmarks/tuned.py " + " ".join(Path(a).name for a in sys.argv[1:]),
        "cpu": f"{cpu_model()}, {cpu_type()}",
        "notes": report.notes,
        "tokens": found,
    }
    print(json.dumps(document, indent=1))


def call(session: Any, tokens: int) -> Callable[[], Any]:
    """A request of so many tokens."""
    ids = np.random.default_rng(0).integers(1000, 2000, (1, tokens))
    mask = np.ones_like(ids)
    return lambda: session.run(ids, mask)


def compare(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of both, and the median of the ratios of rounds: below 1 the second is faster."""
    expected, answer = (np.asarray(run()) for run in calls)
    np.testing.assert_allclose(answer, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))
    count = max(1, round(SAMPLE_SECONDS / seconds(calls[0], 3)))
    rounds = []
    for r in range(ROUNDS):
        times = [0.0, 0.0]
        for i in ((0, 1), (1, 0))[r % 2]:
            times[i] = seconds(calls[i], count)
        rounds.append(times)
    array = np.array(rounds)
    plain, tuned = np.median(array, 0) * 1e3
    ratios = array[:, 1] / array[:, 0]
    tenths = np.quantile(ratios, [0.1, 0.5, 0.9])
    names = ("plain_ms", "tuned_ms", "ratio_p10", "ratio", "ratio_p90")
    return dict(zip(names, (round(float(v), 4) for v in (plain, tuned, *tenths)), strict=True))


def seconds(run: Callable[[], Any], count: int) -> float:
    """Of the thread, for one call."""
    start = time.thread_time()
    for _ in range(count):
        run()
    return (time.thread_time() - start) / count


if __name__ == "__main__":
    main()
