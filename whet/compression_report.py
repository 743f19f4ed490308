"""What ``whet compress`` says of what it made: a report, and the model card that shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from whet.compress.blocks import Block
from whet.compress.recipe import Recipe

RESULTS = "measured.json"
"""File in the model's folder that holds the report."""


@dataclass(frozen=True)
class Measured:
    """One compiled module."""

    model: str
    """``dense`` or ``sparse``."""
    precision: str
    scores: dict[str, float]
    milliseconds: dict[int, float]
    """Median of one request on one thread, by its tokens."""
    size: int
    """Bytes of the module."""
    zeros: float
    """Share of zeros in the dense layers, of int8 modules."""


@dataclass(frozen=True)
class CompressionReport:
    """What was made, and what it is worth."""

    output: str
    sparsity: float
    score: float
    """In torch, on the development data; ``before`` is the model's as it was."""
    score_name: str
    before: float
    seconds: float
    cpu: str = ""
    """On which the modules were timed."""
    data: str = ""
    """What the measured scores are on."""
    measured: tuple[Measured, ...] = ()

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompressionReport:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        measured = tuple(
            Measured(**{**m, "milliseconds": {int(n): ms for n, ms in m["milliseconds"].items()}})
            for m in values.pop("measured")
        )
        return cls(**values, measured=measured)

    def write(self, folder: Path, recipe: Recipe) -> None:
        """Write the report, and the model card that shows it, into the model's folder."""
        for name, text in ((RESULTS, self.to_json() + "\n"), ("README.md", _card(recipe, self))):
            part = folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)

    def table(self) -> str:
        """The measured modules as a Markdown table; empty where none was measured."""
        if not self.measured:
            return ""
        names = list(self.measured[0].scores)
        lengths = list(self.measured[0].milliseconds)
        head = ["", *names, *(f"ms at {n} tokens" for n in lengths), "MB"]
        lines = [" | ".join(head), " | ".join(["---"] * len(head))]
        for m in self.measured:
            zeros = f" ({m.zeros:.0%} zeros)" if m.precision == "int8" else ""
            cells = [f"{m.model} {m.precision}{zeros}", *(f"{m.scores[name]:.4f}" for name in names)]
            cells += [*(f"{m.milliseconds[n]:.3f}" for n in lengths), f"{m.size / 1e6:.1f}"]
            lines.append(" | ".join(cells))
        return "\n".join(f"| {line} |" for line in lines)

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.sparsity:.1%} of the blocks are zero, in {self.seconds:.0f} s; "
            f"{self.score_name} {self.score:.4f} on the development data, {self.before:.4f} as it was"
        ]
        if self.measured:
            lines += [f"on {self.data}, one thread of {self.cpu}:", self.table()]
        return "\n".join(lines)


def _card(recipe: Recipe, report: CompressionReport) -> str:
    """The model card: what it is, what it scores, how it was made."""
    block = Block.parse(recipe.pruning.block)
    name = Path(recipe.model).resolve().name
    kept = f"{report.sparsity:.1%} of the {block.rows} × 4 blocks of its encoder's dense layers are zero"
    lines = [
        f"# {Path(report.output).name}",
        "",
        f"Made of {name} by `whet compress`; {kept}. An ordinary Hugging Face folder: `transformers` loads it, and",
        "`whet compile` makes a module of it that skips the zeros.",
        "",
    ]
    if report.measured:
        lines += [
            f"Scores on {report.data}; median milliseconds of one request on one thread of {report.cpu}; size of the "
            "compiled module. Scores are shares, those of answers points of 100.",
            "",
            report.table(),
            "",
        ]
    lines += [
        f"{report.score_name} in torch on the development data: {report.score:.4f}; {report.before:.4f} as it was.",
        "",
        "The same again: `whet compress --recipe recipe.toml -o OUT`. The recipe:",
        "",
        "```toml",
        recipe.to_toml().rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
