"""Score and time what ``whet compress`` made, beside the dense model it was made of."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.bench import interleave, random_inputs
from whet.compiler import Precision, Report, compile
from whet.compress.folders import has_head
from whet.compress.recipe import FILE, Recipe
from whet.compression_report import RESULTS, CompressionReport, Measured
from whet.datasets import Dataset, LabelledText, Question, Row, ScoredPair, TaggedWords, Text, read_dataset
from whet.evaluate import evaluate
from whet.progress import Progress, Silent
from whet.runtime import Session, load
from whet.runtime.cpu import cpu_model

if TYPE_CHECKING:
    from whet.compress.data import Example

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
SEQUENCES = (32, 128)
"""Tokens per request of the latencies."""
SECONDS = 1.0
"""Timed seconds of each module at each length."""
CALIBRATION = 256
"""Training texts that the int8 scales are calibrated with."""


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
    for name in (FILE, RESULTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder that whet compress made")
    recipe = Recipe.read(folder / FILE)
    report = CompressionReport.from_json((folder / RESULTS).read_text(encoding="utf-8"))
    training, development = examples_of(recipe)
    rows = rows_to_score(recipe, test, test_format) if test is not None else _rows(development)
    texts = texts_of(random.Random(recipe.seed).sample(training, min(CALIBRATION, len(training))))
    measured = _measure(recipe, folder, rows, texts, progress or Silent())
    data = str(test) if test is not None else "the development data"
    report = replace(report, cpu=cpu_model(), data=data, measured=measured)
    report.write(folder, recipe)
    return report


def rows_to_score(recipe: Recipe, test: str | PathLike[str], format: str) -> list[Row]:
    """Read test data; ValueError where a model for the recipe's task can't be scored by it."""
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
