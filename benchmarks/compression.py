"""Accuracy against latency of compressed models: gathers what ``whet compress`` measured into one table and a picture.

    python benchmarks/compression.py NAME FOLDER [FOLDER ...]    # writes results/NAME.json, .md and .svg

Each folder was made by one ``whet compress``; the table gives the command. Folders of one task and one dense model make
a section and a panel of the picture. Needs matplotlib.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import table

from whet.compress.make_recipe import PLACES, make_recipe
from whet.compress.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
DRAWN = "32"
"""Tokens of the request whose time the picture shows."""
COLUMNS = 3
"""Panels in a line of it, at most."""


@dataclass(frozen=True)
class Row:
    """One compiled module."""

    model: str
    """What it was made of, and how."""
    precision: str
    score: float
    score_name: str
    milliseconds: dict[str, float]
    relative: dict[str, float]
    """Times as shares of the dense int8 module's in the same run: runs differ by what else the machine does."""
    size: int
    zeros: float
    blocks: str
    steps: int
    minutes: float
    command: str
    curve: dict[str, float]
    """Score on the development data by training steps."""


@dataclass(frozen=True)
class Section:
    """All modules of one task and one dense model."""

    title: str
    data: str
    rows: list[Row]


def main() -> None:
    """Gather, write, draw."""
    name, *folders = sys.argv[1:]
    sections = gather([Path(folder) for folder in folders])
    cpu = json.loads((Path(folders[0]) / "measured.json").read_text(encoding="utf-8"))["cpu"]
    document = {"cpu": cpu, "sections": [asdict(section) for section in sections]}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(sections, cpu, path.with_suffix(".svg"))
    path.with_suffix(".md").write_text(markdown(sections, cpu, path.with_suffix(".svg").name), encoding="utf-8")


def gather(folders: Sequence[Path]) -> list[Section]:
    """Read the folders; the dense modules of a section are those of its first folder."""
    sections: dict[tuple[str, str], Section] = {}
    recipes = [Recipe.read(folder / "recipe.toml") for folder in folders]
    for folder, recipe in zip(folders, recipes, strict=True):
        report = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        dense = Path(recipe.teacher or recipe.model).name
        key = recipe.task, dense
        known = key in sections
        if not known:
            sections[key] = Section(f"{dense}, {recipe.task.replace('_', ' ')}", Path(report["data"]).name, [])
        own = describe(recipe, [r for r in recipes if (r.task, Path(r.teacher or r.model).name) == key])
        base = next(m for m in report["measured"] if (m["model"], m["precision"]) == ("dense", "int8"))["milliseconds"]
        for module in report["measured"]:
            if module["model"] == "dense" and known:
                continue
            sparse = module["model"] != "dense"
            scores = module["scores"]
            score_name = "f1" if "f1" in scores else next(iter(scores))  # what is published for answers
            sections[key].rows.append(
                Row(
                    model=own if sparse else "dense",
                    precision=module["precision"],
                    score=scores[score_name],
                    score_name=score_name,
                    milliseconds=module["milliseconds"],
                    relative={n: ms / base[n] for n, ms in module["milliseconds"].items()},
                    size=module["size"],
                    zeros=report["sparsity"] if sparse else 0.0,
                    blocks=recipe.pruning.block if sparse else "",
                    steps=recipe.training.steps if sparse else 0,
                    minutes=report["seconds"] / 60 if sparse else 0.0,
                    command=command(recipe, folder, report["data"]) if sparse else "",
                    curve=curve(folder) if sparse else {},
                )
            )
    return list(sections.values())


def curve(folder: Path) -> dict[str, float]:
    """What the log of a training says of its scores."""
    log = folder / "training.jsonl"
    records = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.is_file() else ()
    return {str(record["step"]): record["score"] for record in records}


def describe(recipe: Recipe, others: Sequence[Recipe]) -> str:
    """What a row is called: how much was pruned and trained, and in what it differs from ``others`` of that name."""
    alike = [flat(r) for r in others if brief(r) == brief(recipe)]
    own = flat(recipe)
    differing = [name for name in own if own[name] and any(fields[name] != own[name] for fields in alike)]
    return ", ".join([brief(recipe), *(f"{name.replace('_', ' ')} {own[name]}" for name in differing)])


def brief(recipe: Recipe) -> str:
    """How much was pruned and trained."""
    pruning, steps = recipe.pruning, recipe.training.steps
    if pruning.method == "lock":
        return f"{Path(recipe.model).name}, {steps} steps"
    budget = " by time" if pruning.budget == "latency" else ""
    return f"{pruning.sparsity:.0%} {pruning.block}{budget}, " + (f"{steps} steps" if steps else "no training")


def flat(recipe: Recipe) -> dict[str, Any]:
    """Fields that decide what is made, without their tables; those that only say how often to look are left out."""
    tables = recipe.to_table()
    fields = {**tables["data"], **tables["pruning"], **tables["distillation"], **tables["training"]}
    left_out = ("shares", "evaluate_every", "checkpoint_every")
    return {
        name: " ".join(Path(file).name for file in value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name not in left_out
    }


def command(recipe: Recipe, folder: Path, test: str) -> str:
    """The command that makes the row again: all that is not as by default, files by their names alone."""
    options = {"task": recipe.task, "data": list(recipe.data.train)}
    plain = make_recipe(None, {"model": recipe.model, **options}).to_table()
    own = recipe.to_table()
    own["pruning"]["shares"] = {}  # the budget chooses them again
    words = [
        "whet compress",
        Path(recipe.model).name,
        "--task",
        recipe.task,
        *(f"--data {d}" for d in recipe.data.train),
    ]
    named = {place: f"--{name}" for name, place in PLACES.items() if name != "data"}
    for table_name, values in own.items():
        for field, value in values.items() if isinstance(values, dict) else ():
            if value == plain[table_name][field] and field not in ("sparsity", "block"):
                continue
            option = named.get((table_name, field), f"--set {table_name}.{field}=")
            for text in value if isinstance(value, list) else [value]:
                if (table_name, field) != ("data", "train"):
                    words.append(f"{option}{text}" if option.endswith("=") else f"{option} {text}")
    text = " ".join([*words, "--test", test, "-o", folder.name])
    return re.sub(r"\S*/", "", text)


def markdown(sections: Iterable[Section], cpu: str, picture: str) -> str:
    """All tables."""
    parts = [
        "# Compressed models: accuracy against latency",
        f"One thread of {cpu}; median milliseconds of one request, and their share of the dense int8 module's, with "
        "which the modules of a folder took turns. Scores on test sets, times 100.",
        "The commands leave folders out; STS-B and SST-2 as published also want `--test-format stsb` or `sst2`.",
        f"![Score against time at {DRAWN} tokens; the line joins the points that no other beats]({picture})",
    ]
    for section in sections:
        rows = section.rows
        lengths = list(rows[0].milliseconds)
        head = ["", "", f"{rows[0].score_name}", *(f"ms at {n} tokens" for n in lengths), "MB", "minutes to make"]
        body = [
            [
                row.model,
                row.precision,
                f"{100 * share(row):.2f}",
                *(f"{row.milliseconds[n]:.2f} ({row.relative[n]:.2f})" for n in lengths),
                f"{row.size / 1e6:.1f}",
                f"{row.minutes:.0f}" if row.minutes else "",
            ]
            for row in rows
        ]
        commands = dict.fromkeys(row.command for row in rows if row.command)
        parts += [f"## {section.title}, {section.data}", table(head, body)]
        curves = {row.model: row.curve for row in rows if row.curve}
        parts += [
            f"{model}, while training, on the development data: "
            + ", ".join(f"{100 * score:.2f} after {steps}" for steps, score in points.items())
            for model, points in curves.items()
        ]
        parts.append("```sh\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def share(row: Row) -> float:
    """The score as a share of 1; those of answers are points of 100."""
    return row.score / 100 if row.score > 1 else row.score


def draw(sections: Sequence[Section], cpu: str, path: Path) -> None:
    """Score against time, a panel per section, with the Pareto front."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    columns = min(len(sections), COLUMNS)
    lines = -(-len(sections) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 4.5 * lines), squeeze=False)
    for axis in axes.flat[len(sections) :]:
        axis.remove()
    for axis, section in zip(axes.flat, sections, strict=False):
        points = [(row.relative[DRAWN], 100 * share(row), row) for row in section.rows]
        for precision, marker in (("fp32", "o"), ("int8", "s")):
            for i, blocks in enumerate(dict.fromkeys(row.blocks for row in section.rows)):
                own = [(x, y) for x, y, row in points if (row.precision, row.blocks) == (precision, blocks)]
                if own:
                    label = f"{precision}, {blocks or 'dense'}"
                    axis.scatter(*zip(*own, strict=True), marker=marker, color=f"C{i}", label=label)
        front = pareto([(x, y) for x, y, _ in points])
        axis.plot(*zip(*front, strict=True), color="black", linewidth=1, zorder=0)
        for x, y, row in points:
            if (x, y) in front:
                axis.annotate(
                    ", ".join(row.model.split(", ")[:2]), (x, y), fontsize=7, xytext=(4, -8), textcoords="offset points"
                )
        axis.set(
            title=section.title, xlabel=f"time at {DRAWN} tokens, dense int8 = 1", ylabel=section.rows[0].score_name
        )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, loc="lower center")
    figure.suptitle(f"One thread of {cpu}")
    figure.tight_layout()
    figure.savefig(path)


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points with which no other is faster and as good, fastest first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


if __name__ == "__main__":
    main()
