"""The table and the picture of what ``compare.py`` measured.

python benchmarks/report.py benchmarks/results/comparison-….json     # needs matplotlib
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Cell = Mapping[str, Any]
"""Results by contestant, which is "ENGINE VARIANT, WEIGHTS"."""

FAITHFUL = 0.97
"""Cosine that every engine's int8 keeps here; what lies below computes something else, Whet or the other."""
SPARSE = ("80% 4x4", "90% 4x4", "80% 1x4", "90% 1x4")
ANY_BLOCK = {"80% 1x4": "80% 4x4", "90% 1x4": "90% 4x4"}
"""An engine with blocks of another form runs its own: the peers with these zeros compete as well."""
NOTES = (
    "Median milliseconds of a pass{clock}; a ratio is the other engine's time over Whet's in the same round, the "
    "median of all rounds with their 10th and 90th percentile. Cosines with Whet's output are in the JSON."
)
CLOCKS = {"wall": "", "cpu": " (of CPU time: the core was shared with other work)"}


def main() -> None:
    """Write the Markdown and the picture beside the JSON."""
    path = Path(sys.argv[1])
    document = json.loads(path.read_text(encoding="utf-8"))
    picture = path.with_suffix(".svg")
    draw(document, picture)
    path.with_suffix(".md").write_text(markdown(document, picture.name), encoding="utf-8")


def markdown(document: Mapping[str, Any], picture: str) -> str:
    """All tables."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in sorted(document["versions"].items()))
    threads = f"{document['threads']} thread" + "s" * (document["threads"] > 1)
    parts = [
        f"# Encoders on {machine['cpu']}, {threads}",
        f"`{document['command']}`; {machine['isa']}, Linux {machine['kernel']}; {versions}.",
        NOTES.format(clock=CLOCKS[document.get("clock", "wall")]),
        f"![Times of the fastest variant of each engine]({picture})",
    ]
    if "peaks" in machine:
        rows = [[name.replace("_", " "), f"{value:.1f}"] for name, value in machine["peaks"].items()]
        parts += ["## What one core can do", table(["peak", "G operations/s, or GB/s"], rows)]
    for shape, cells in document["cells"].items():
        parts += [
            f"## {shape}: Whet and the best of the others",
            table(["case", "Whet", "", "best other", "", "ratio", "p10–p90"], best(cells)),
            f"## {shape}: everyone, ms (× Whet with the same weights)",
            table(["", *cells], everyone(cells)),
        ]
    if missing := sorted(failures(document["cells"])):
        parts += ["## Missing", "\n".join(f"- {line}" for line in missing)]
    if doubtful := sorted(strangers(document["cells"])):
        parts += ["## Outputs that disagree with Whet's", "\n".join(f"- {line}" for line in doubtful)]
    for shape, floors in document["floors"].items():
        for model, ops in floors.items():
            parts += [f"## {shape}, {model} tokens: Whet's kernels and their floors", floor_table(ops, machine)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best(cells: Mapping[str, Cell]) -> list[list[str]]:
    """Whet with each weights beside the fastest sparse and the fastest dense peer."""
    rows = []
    for case, cell in cells.items():
        for weights in ("dense", *SPARSE):
            own = f"whet int8, {weights}"
            if not times(cell, own):
                continue
            same = {weights, ANY_BLOCK.get(weights, weights)}
            for zeros in (same, {"dense"}) if weights != "dense" else ({"dense"},):
                rivals = [c for c in cell if not c.startswith("whet") and c.rsplit(", ", 1)[1] in zeros]
                rivals = [c for c in rivals if times(cell, c)]
                if rivals:
                    rival = quickest(cell, rivals)
                    rows.append([case, weights, ms(cell, own), rival, ms(cell, rival), *ratio(cell, rival, own)])
    return rows


def everyone(cells: Mapping[str, Cell]) -> list[list[str]]:
    """One row per contestant, one column per case."""
    rows = []
    for contestant in dict.fromkeys(c for cell in cells.values() for c in cell):
        own = "whet int8, " + contestant.rsplit(", ", 1)[1]
        row = [contestant]
        for cell in cells.values():
            if contestant not in cell:
                row.append("")
            elif not times(cell, contestant):
                row.append("failed")
            elif contestant == own or not times(cell, own):
                row.append(ms(cell, contestant))
            else:
                row.append(f"{ms(cell, contestant)} ({ratio(cell, contestant, own)[0]})")
        rows.append(row)
    return rows


def quickest(cell: Cell, contestants: Iterable[str]) -> str:
    """The one with the least median."""
    return min(contestants, key=lambda contestant: median(times(cell, contestant)))


def times(cell: Cell, contestant: str) -> list[float]:
    """Milliseconds by round; none if it failed or was not there."""
    found: list[float] = cell.get(contestant, {}).get("ms", [])
    return found


def ms(cell: Cell, contestant: str) -> str:
    """The median time."""
    return f"{median(times(cell, contestant)):.2f}"


def ratio(cell: Cell, other: str, own: str) -> tuple[str, str]:
    """How many times longer the other takes, and the spread of that."""
    found = ratios(cell, other, own)
    tenths = quantiles(found, n=10, method="inclusive") if len(found) > 1 else found
    return f"{median(found):.2f}×", f"{tenths[0]:.2f}–{tenths[-1]:.2f}"


def ratios(cell: Cell, other: str, own: str) -> list[float]:
    """The other's time over one's own, by round."""
    return [a / b for a, b in zip(times(cell, other), times(cell, own), strict=False)]


def failures(shapes: Mapping[str, Mapping[str, Cell]]) -> set[str]:
    """What failed, where, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for shape, cells in shapes.items():
        for case, cell in cells.items():
            for contestant, result in cell.items():
                if "error" in result:
                    found.setdefault((contestant, result["error"]), []).append(f"{shape} {case}")
    return {f"{contestant} ({places(where)}): {error}" for (contestant, error), where in found.items()}


def strangers(shapes: Mapping[str, Mapping[str, Cell]]) -> set[str]:
    """Who computes something else."""
    found: dict[str, list[str]] = {}
    for shape, cells in shapes.items():
        for case, cell in cells.items():
            for contestant, result in cell.items():
                if (cosine := result.get("cosine")) is not None and cosine < FAITHFUL:
                    found.setdefault(contestant, []).append(f"{shape} {case}: cosine {cosine:.2f}")
    return {f"{contestant} ({places(where)})" for contestant, where in found.items()}


def places(where: Sequence[str]) -> str:
    """A few of them by name."""
    return "; ".join(where[:3]) + (f"; and {len(where) - 3} more" if len(where) > 3 else "")


def floor_table(ops: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """Each kernel's time, its share, and the time that the machine's peaks allow."""
    peaks: Mapping[str, float] = machine.get("peaks", {})
    total = sum(op["ms"] for op in ops)
    rows, floor = [], 0.0
    for op in ops:
        arithmetic, memory = lower_bounds(op, peaks)
        floor += max(arithmetic, memory)
        least = f"{arithmetic:.3f} | {memory:.3f} | {op['ms'] / max(arithmetic, memory, 1e-9):.1f}×" if peaks else "||"
        counts = f"{op['multiply_adds'] / 1e6:.1f}"
        rows.append(
            [op["name"], str(op["calls"]), f"{op['ms']:.3f}", f"{op['ms'] / total:.0%}", counts, *least.split(" | ")]
        )
    rows.append(["all", "", f"{total:.3f}", "", "", "", f"{floor:.3f}", f"{total / max(floor, 1e-9):.1f}×"])
    return table(
        ["kernel", "calls", "ms", "share", "10⁶ multiply-adds", "arithmetic ms", "reads ms", "time/floor"], rows
    )


def lower_bounds(op: Mapping[str, Any], peaks: Mapping[str, float]) -> tuple[float, float]:
    """Milliseconds that the arithmetic and the reads take at least: weights from L3, activations from L2."""
    vector = next((peaks[p] for p in ("int8_vnni512", "int8_vnni256", "int8_madd_avx2") if p in peaks), 0.0)
    rate = {
        "int8 sparse": vector,
        "int8": peaks.get("int8_amx", vector),
        "fp32": peaks.get("fp32_fma512", peaks.get("fp32_fma256", 0.0)),
        "none": 0.0,
    }[op["unit"]]
    arithmetic = 2 * op["multiply_adds"] / (rate * 1e9) if rate else 0.0
    reads = [(op["weight_bytes"], peaks.get("read_L3")), (op["value_bytes"], peaks.get("read_L2"))]
    memory = sum(size / (speed * 1e9) for size, speed in reads if speed)
    return arithmetic * 1e3, memory * 1e3


def draw(document: Mapping[str, Any], path: Path) -> None:
    """How many times longer than Whet each engine takes, at its fastest; dense, and with 80 % zeros in 4 × 4 blocks."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels = [(shape, cells, zeros) for shape, cells in document["cells"].items() for zeros in ("dense", "80% 4x4")]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 3 * len(panels)), squeeze=False)
    engines = sorted({engine(c) for _, cells, _ in panels for cell in cells.values() for c in cell} - {"whet"})
    width = 0.8 / max(1, len(engines))
    for axis, (shape, cells, zeros) in zip(axes[:, 0], panels, strict=True):
        least = {case: found for case, cell in cells.items() if (found := fastest(cell, zeros))}
        for i, name in enumerate(engines):
            bars = [found.get(name, float("nan")) for found in least.values()]
            left = [x + i * width - 0.4 for x in range(len(least))]
            axis.bar(left, bars, width, align="edge", label=name, color=f"C{i}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=f"{shape}, {zeros}", ylabel="times as long as Whet", xticks=range(len(least)))
        axis.set_yscale("log", base=2)  # the slowest takes thousands of times as long
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticklabels(list(least), fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{document['machine']['cpu']}, threads: {document['threads']}. The line at 1 is Whet")
    figure.tight_layout()
    figure.savefig(path)


def engine(contestant: str) -> str:
    """The first word of a contestant."""
    return contestant.split(maxsplit=1)[0]


def fastest(cell: Cell, zeros: str) -> dict[str, float]:
    """Ratio of the best time of each engine, with these weights or dense ones, to Whet's with these."""
    found: dict[str, float] = {}
    own = f"whet int8, {zeros}"
    for contestant in cell:
        same = contestant.rsplit(", ", 1)[1] in (zeros, "dense")
        if same and engine(contestant) != "whet" and times(cell, contestant) and times(cell, own):
            value = float(ratio(cell, contestant, own)[0][:-1])
            found[engine(contestant)] = min(found.get(engine(contestant), value), value)
    return found


if __name__ == "__main__":
    main()
