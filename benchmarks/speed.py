"""Whet beside ONNX Runtime on DistilBERT-base and MiniLM-L6 shapes: the README's speed table.

    python benchmarks/speed.py            # writes benchmarks/results/speed-CPU.json and .md

Same weights, same token ids, engines in turns on one pinned core, medians. Random weights: zeros and shapes are real.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from models import SHAPES, make_model

import whet
from whet.bench import BenchReport, Timing, bench, cpu_model
from whet.progress import TerminalProgress

SEQUENCES = (16, 32, 128, 384)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure every shape, dense and sparse, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where models and modules are made")
    parser.add_argument("--isa", default="host", help="instruction set to compile for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-seconds", type=float, default=2.0, help="timed seconds per engine and case")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    reports = {}
    for shape in arguments.shapes:
        for sparsity, precision in ((0.8, "int8"), (0.0, "int8"), (0.0, "fp32")):
            zeros = f"{sparsity:.0%} zeros in 4×4 blocks" if sparsity else "dense"
            name = f"{shape}, {zeros}, {precision}"
            print(name, file=sys.stderr)
            folder = make_model(arguments.work / f"{shape}-{sparsity:.0%}", shape, sparsity)
            module = folder / f"{precision}-{arguments.isa}.so"
            whet.compile(folder, module, precision, isa=arguments.isa)
            reports[name] = bench(
                module,
                sequences=SEQUENCES,
                threads=[arguments.threads],
                min_seconds=arguments.min_seconds,
                against=["onnxruntime"],
                source=folder,
                progress=TerminalProgress(),
            )
            print(reports[name], file=sys.stderr)
    command = "python " + " ".join(["benchmarks/speed.py", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    cpu = re.sub(r"\W+", "-", cpu_model()).strip("-").lower()
    stem = f"speed-{cpu}-{next(iter(reports.values())).isa}-{arguments.threads}-threads"
    document = {"command": command, "reports": {name: asdict(report) for name, report in reports.items()}}
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1))
    table = markdown(command, reports)
    (RESULTS / f"{stem}.md").write_text(table)
    print(table)


def markdown(command: str, reports: dict[str, BenchReport]) -> str:
    """One row per case: medians in ms, and how many times longer each peer takes."""
    first = next(iter(reports.values()))
    peers = list(
        dict.fromkeys(t.engine for r in reports.values() for t in r.timings if not t.engine.startswith("whet"))
    )
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    lines = [
        f"`{command}` on {first.cpu}, {first.isa}, {first.timings[0].threads} thread, batch 1, {versions}.",
        "Medians in ms with the 10th and 90th percentile; in brackets, how many times longer than Whet.",
        "",
        "| model | tokens | Whet | " + " | ".join(peers) + " |",
        "|---|---|---|" + "---|" * len(peers),
    ]
    for name, report in reports.items():
        for sequence in dict.fromkeys(t.sequence for t in report.timings):
            of = {t.engine: t for t in report.timings if t.sequence == sequence}
            own = next(t for t in of.values() if t.engine not in peers)
            cells = [f"{of[p].median_ms:.2f} ({of[p].ratio:.2f}×)" if p in of else "–" for p in peers]
            lines.append(f"| {name} | {sequence} | {_spread(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(timing: Timing) -> str:
    return f"{timing.median_ms:.2f} ({timing.p10_ms:.2f}–{timing.p90_ms:.2f})"


if __name__ == "__main__":
    main()
