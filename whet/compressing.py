"""Compress a model: what ``whet compress`` runs. Prunes and trains by a recipe, then measures what came of it.

>>> from whet.compressing import Recipe, compress
>>> compress(Recipe(model="path/to/model", task="embedding", data=Data(train=("texts.txt",))), "sparse")
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.bench import interleave, random_inputs
from whet.compiler import Precision, Report, compile
from whet.compress.blocks import Block
from whet.compress.folders import has_head
from whet.compress.recipe import Data, Distillation, Pruning, Recipe, Training, parse_value
from whet.datasets import Dataset, LabelledText, Question, Row, ScoredPair, TaggedWords, Text, read_dataset
from whet.evaluate import evaluate
from whet.host import host_isa
from whet.passes.choose_kernels import TYPICAL_TOKENS
from whet.progress import Progress, Silent
from whet.runtime import Session, load
from whet.runtime.cpu import cpu_model
from whet.schedules.cost import estimate_cycles
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.isa import TILE, Isa
from whet.schedules.isa import isa as find_isa

if TYPE_CHECKING:
    from whet.compress.data import Example
    from whet.compress.run import Compressed

__all__ = [
    "CompressionReport",
    "Data",
    "Distillation",
    "Measured",
    "Pruning",
    "Recipe",
    "Training",
    "compress",
    "make_recipe",
    "measure_folder",
    "plan",
]

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
SEQUENCES = (32, 128)
"""Tokens per request of the latencies."""
SECONDS = 1.0
"""Timed seconds of each module at each length."""
CALIBRATION = 256
"""Training texts that the int8 scales are calibrated with."""
RECIPE, RESULTS = "recipe.toml", "measured.json"


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


def compress(
    recipe: Recipe,
    output: str | PathLike[str],
    *,
    test: str | PathLike[str] | None = None,
    test_format: str = "",
    measure: bool = True,
    isa: str = "host",
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> CompressionReport:
    """Prune and train the model of ``recipe``, and write an ordinary Hugging Face folder.

    The folder holds the weights, configuration and tokenizer, the recipe, the log of the training, and a model card
    with what was measured. It appears when all is done; until then the state is in ``output`` with the ending
    ``.partial``, and the same call continues an interrupted one, to the same weights.

    Args:
        recipe: everything that decides what is made.
        output: the folder to write; it must not exist.
        test: labelled data that neither training nor recipe has seen; default: the development data.
        test_format: of ``test``, by default told by its ending.
        isa: instruction set whose kernels the budget of time counts.
        measure: compile the dense and the sparse model as fp32 and int8, score and time them.
        progress: told of every phase.
        log: gets a line for people at every evaluation.

    Raises:
        ValueError: the recipe or the data can't be used.
        FileExistsError: ``output`` exists, or an unfinished run of another recipe.
        ImportError: torch or transformers is missing.

    """
    try:
        from whet.compress.run import run_recipe  # noqa: PLC0415 -- torch takes seconds
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(
                f"compressing needs {error.name}, which is not installed: "
                "pip install '.[compile,compress]' in a clone of Whet"
            ) from error
        raise
    progress = progress or Silent()
    if recipe.pruning.budget == "latency" and recipe.pruning.sparsity and not recipe.pruning.shares:
        recipe = plan(recipe, isa, progress)
    reports: list[CompressionReport] = []
    if measure and test is not None:
        _test_rows(recipe, test, test_format)  # what is wrong with them is said before the training

    def finish(folder: Path, made: Compressed) -> None:
        report = CompressionReport(
            output=str(output),
            sparsity=made.sparsity,
            score=made.score,
            score_name=made.score_name,
            before=made.before,
            seconds=made.seconds,
        )
        report.write(folder, recipe)
        if measure:
            report = measure_folder(folder, test=test, test_format=test_format, progress=progress)
        reports.append(report)

    run_recipe(recipe, Path(output), progress, log, finish)
    return reports[0]


def measure_folder(
    folder: str | PathLike[str],
    *,
    test: str | PathLike[str] | None = None,
    test_format: str = "",
    progress: Progress | None = None,
) -> CompressionReport:
    """Score and time what ``compress`` made, beside its dense model, on this machine, and write that into the folder.

    ``compress`` does it by itself; a model that was trained on another machine is measured where it will serve. Its
    recipe has to find the dense model and the data from here: compiled modules are calibrated with training texts.

    Args:
        folder: what ``compress`` wrote.
        test: labelled data that neither training nor recipe has seen; default: the development data.
        test_format: of ``test``, by default told by its ending.
        progress: told of every phase.

    Raises:
        FileNotFoundError: ``folder`` is not what ``compress`` writes, or names what is not here.
        ValueError: the test data can't be used.

    """
    from whet.compress.data import examples_of, texts_of  # noqa: PLC0415

    folder = Path(folder)
    for name in (RECIPE, RESULTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder that whet compress made")
    recipe = Recipe.read(folder / RECIPE)
    report = CompressionReport.from_json((folder / RESULTS).read_text(encoding="utf-8"))
    training, development = examples_of(recipe)
    rows = _test_rows(recipe, test, test_format) if test is not None else _rows(development)
    texts = texts_of(random.Random(recipe.seed).sample(training, min(CALIBRATION, len(training))))
    measured = _measure(recipe, folder, rows, texts, progress or Silent())
    data = str(test) if test is not None else "the development data"
    report = replace(report, cpu=cpu_model(), data=data, measured=measured)
    report.write(folder, recipe)
    return report


def plan(recipe: Recipe, isa: str = "host", progress: Progress | None = None) -> Recipe:
    """Choose a sparsity for every layer: as fast as ``pruning.sparsity`` in all of them, by the compiler's cost model.

    What a layer loses at each sparsity is measured on calibration texts (:mod:`whet.compress.sensitivity`), the cycles
    that its kernel takes are estimated for ``isa``; the sum of the losses is least at that sum of cycles.

    Returns:
        The recipe with ``pruning.shares``, which need no plan again.

    """
    from whet.compress.run import sensitivity_of  # noqa: PLC0415
    from whet.compress.sensitivity import allocate  # noqa: PLC0415

    pruning = recipe.pruning
    grid = sorted({*(round(0.05 * i, 2) for i in range(20)), pruning.sparsity})
    losses, shapes = sensitivity_of(recipe, grid, progress or Silent())
    rows = Block.parse(pruning.block).rows
    target = host_isa() if isa == "host" else find_isa(isa)
    cycles = {name: {s: _cycles(shapes[name], rows, 1 - s, target) for s in grid} for name in losses}
    limit = sum(curve[pruning.sparsity] for curve in cycles.values())
    return replace(recipe, pruning=replace(pruning, shares=allocate(losses, cycles, limit)))


def _cycles(shape: tuple[int, int], block_rows: int, density: float, isa: Isa) -> float:
    """Cycles of a layer, with the faster of the dense kernel and that of the blocks."""
    tiles = math.ceil(TYPICAL_TOKENS / TILE)
    dense = estimate_cycles(DenseSpec(*shape, "i8"), tiles, 1.0, isa)
    sparse = estimate_cycles(DenseSpec(*shape, "i8_sparse", block_rows), tiles, density, isa)
    return min(dense, max(sparse, density * dense))


GENTLE_RATE = 1e-4
"""Learning rate where little was pruned: a higher one loses more at first than a short training brings back."""

PLACES = {
    "data": ("data", "train"),
    "unlabelled": ("data", "unlabelled"),
    "development": ("data", "development"),
    "format": ("data", "format"),
    "sparsity": ("pruning", "sparsity"),
    "block": ("pruning", "block"),
    "method": ("pruning", "method"),
    "budget": ("pruning", "budget"),
    "steps": ("training", "steps"),
}
"""Where the options that have a name of their own stand in a recipe."""


def make_recipe(
    base: str | PathLike[str] | None = None, options: Mapping[str, Any] | None = None, fields: Sequence[str] = ()
) -> Recipe:
    """Make a recipe of a file, or of defaults for the task, with some fields changed.

    Args:
        base: a recipe file.
        options: ``model``, ``task``, ``teacher``, ``seed``, and those of ``PLACES``.
        fields: ``table.field=value`` each, with the value as in TOML (quotes may be left out).

    Without ``base``, the teacher is by default the model itself where it has a head for the task, the labels count
    where there are any, methods that choose blocks by size or gradient do so in 20 updates, and the learning rate
    is ``GENTLE_RATE`` after ``reconstruct`` took at most half of the blocks.

    Raises:
        ValueError: a field is unknown, missing or wrong.

    """
    table: dict[str, Any] = Recipe.read(Path(base)).to_table() if base is not None else {}
    for name, value in (options or {}).items():
        *path, last = PLACES.get(name, (name,))
        place = table
        for step in path:
            place = place.setdefault(step, {})
        place[last] = list(value) if isinstance(value, list | tuple) else value
    for text in fields:
        _set(table, text)
    if base is None:
        _defaults(table)
    return Recipe.from_table(table)


def _set(table: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    *path, last = name.strip().split(".")
    if not equals or not last:
        raise ValueError(f"{text!r} is no field of a recipe; expected table.field=value")
    for step in path:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name} is no field of a recipe: {step} is no table")
    table[last] = parse_value(value)


def _defaults(table: dict[str, Any]) -> None:
    """Fill in what depends on the task and the model."""
    for name in ("model", "task"):
        if not table.get(name):
            raise ValueError(f"no {name} is given; name it, or a recipe")
    pruning, distillation = table.setdefault("pruning", {}), table.setdefault("distillation", {})
    if table["task"] != "embedding":
        distillation.setdefault("labels", 1.0)
    if pruning.get("method") in ("magnitude", "movement", "snip_momentum"):
        pruning.setdefault("updates", 20)
    if pruning.get("method", Pruning.method) == "reconstruct" and 0 < pruning.get("sparsity", Pruning.sparsity) <= 0.5:
        table.setdefault("training", {}).setdefault("learning_rate", GENTLE_RATE)
    if "teacher" not in table:
        table["teacher"] = table["model"] if has_head(table["model"], table["task"]) else ""


def _test_rows(recipe: Recipe, test: str | PathLike[str], format: str) -> list[Row]:
    from whet.compress.data import SUFFIXES, read_examples  # noqa: PLC0415

    kind = format or SUFFIXES.get(Path(test).suffix, "")
    if recipe.task == "question_answering":
        return list(read_dataset(test, kind).rows)
    rows = _rows(read_examples([str(test)], recipe.task, kind, recipe.data.columns))
    if not rows:
        raise ValueError(f"{test} holds no rows that {recipe.task} is scored by")
    return rows


def _rows(examples: Sequence[Example]) -> list[Row]:
    """The examples that :mod:`whet.evaluate` scores."""
    from whet.compress.data import Span  # noqa: PLC0415

    rows: list[Row] = []
    for i, e in enumerate(examples):
        if isinstance(e, LabelledText | TaggedWords) or (isinstance(e, ScoredPair) and not math.isnan(e.score)):
            rows.append(e)
        elif isinstance(e, Span):
            rows.append(Question(str(i), e.question, e.context, (e.context[e.start : e.end],)))
    return rows


def _measure(
    recipe: Recipe, folder: Path, rows: Sequence[Row], texts: Sequence[Text], progress: Progress
) -> tuple[Measured, ...]:
    """Compile, score and time the dense and the sparse model."""
    models = {"sparse" if recipe.pruning.sparsity else "fine-tuned": folder}
    if recipe.teacher or has_head(recipe.model, recipe.task):
        models = {"dense": Path(recipe.teacher or recipe.model), **models}
    pooling: Any = "mean" if recipe.task == "embedding" and not (folder / "modules.json").is_file() else None
    modules: dict[tuple[str, str], tuple[Report, Session, dict[str, float]]] = {}
    with TemporaryDirectory(prefix="whet-compress-") as scratch:
        for name, source in models.items():
            for precision in PRECISIONS:
                module = Path(scratch) / f"{name}-{precision}.so"
                options: dict[str, Any] = {"calibration": list(texts)} if precision == "int8" else {}
                with progress.phase(f"compile {name} {precision}"):
                    report = compile(source, module, precision, pooling=pooling, **options)
                session = load(module, 1)
                scores = evaluate(session, Dataset(rows), progress).scores if rows else {}
                modules[name, precision] = report, session, scores
        times = _times({key: session for key, (_, session, _) in modules.items()}, progress)
        return tuple(
            Measured(*key, scores, times[key], report.size, _zeros(report))
            for key, (report, _, scores) in modules.items()
        )


def _times(sessions: Mapping[tuple[str, str], Session], progress: Progress) -> dict[tuple[str, str], dict[int, float]]:
    """Median milliseconds of a request by its tokens; modules take turns: what else the machine does meets all."""
    metadata = next(iter(sessions.values())).metadata
    times: dict[tuple[str, str], dict[int, float]] = {key: {} for key in sessions}
    for length in sorted({min(n, metadata.max_length) for n in SEQUENCES}):
        inputs = tuple(random_inputs(metadata, 1, length).values())[: 3 if metadata.type_vocab_size > 1 else 2]
        with progress.phase(f"time {length} tokens"):
            runs = interleave({str(i): partial(s.run, *inputs) for i, s in enumerate(sessions.values())}, SECONDS)
        for key, seconds in zip(sessions, runs.values(), strict=True):
            times[key][length] = float(np.median(seconds)) * 1e3
    return times


def _zeros(report: Report) -> float:
    """Share of zeros in the dense layers that have integer weights."""
    layers = [(layer.zeros, layer.out_features * layer.in_features) for layer in report.layers]
    return sum(zeros * size for zeros, size in layers) / max(1, sum(size for _, size in layers))


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
