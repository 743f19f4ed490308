"""Run a recipe: read and check the data, load the models, prune and train, write a Hugging Face folder."""

from __future__ import annotations

import random
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from whet.progress import Progress

from .blocks import Block
from .data import Example, all_labels, examples_of
from .features import Batch, Feature, in_order, make_features
from .folders import has_head
from .hardware import device
from .models import Encoder, load_encoder
from .pruner import Pruner
from .recipe import FILE, Recipe
from .scores import Scorer
from .sensitivity import Curve, measure_sensitivity
from .train import append, train

CALIBRATION_TOKENS = 1 << 17
"""What calibrates pruning is at most so many tokens: all that layers make of them stays in memory."""
LOG, CHECKPOINT = "training.jsonl", "checkpoint.safetensors"


@dataclass(frozen=True)
class Compressed:
    """What was made."""

    output: Path
    sparsity: float
    """Share of zero blocks in the dense layers of the encoder."""
    score: float
    """On the development data."""
    score_name: str
    before: float
    """The model's as it was; with a new head, by chance."""
    seconds: float
    errors: dict[str, float]
    """Relative squared error of each layer's output after reconstruction."""


def work_folder(output: Path) -> Path:
    """Where a compression keeps its state until ``output`` is complete."""
    return output.with_name(output.name + ".partial")


def run_recipe(
    recipe: Recipe,
    output: Path,
    progress: Progress,
    log: Callable[[str], None],
    finish: Callable[[Path, Compressed], None] = lambda folder, made: None,
) -> Compressed:
    """Make the model of ``recipe``; the folder ``output`` appears when it is complete.

    A run that was interrupted continues if it is called again with the same recipe. ``log`` gets a line for people at
    every evaluation; ``finish`` may add to the folder before it gets its name.

    Raises:
        ValueError: the data or the recipe can't be used; said before any training.
        FileExistsError: ``output`` exists, or an unfinished run of another recipe.

    """
    began = time.perf_counter()
    work = _open_work(recipe, output)
    torch.manual_seed(recipe.seed)
    with progress.phase("read data"):
        training, development = examples_of(recipe)
    with progress.phase("load models"):
        student, teacher, reference = _models(recipe, training)
    with progress.phase("tokenise"):
        features, calibration = _features(recipe, student, training)
    with progress.phase("score the model as it is"):
        scorer = Scorer(student, development, reference, recipe.data.max_length)
        before = scorer(student)
    pruner = Pruner(student, reference, recipe.pruning, recipe.training.steps, calibration)
    log(f"{scorer.name} as it is: {before:.4f}")

    def note(record: dict[str, Any]) -> None:
        append(work / LOG, record)
        parts = ", ".join(f"{name} {value:.4f}" for name, value in record["loss"].items())
        log(
            f"step {record['step']} of {recipe.training.steps}: loss {parts}; sparsity {record['sparsity']:.1%}; "
            f"{scorer.name} {record['score']:.4f}; {record['seconds_left'] // 60} min left"
        )

    train(student, teacher, features, pruner, scorer, recipe, work / CHECKPOINT, progress, note)
    with progress.phase("score"):
        score = scorer(student)
    folder = work / "model"
    with progress.phase("save"):
        student.save(folder)
        shutil.copy(work / FILE, folder / FILE)
        if (work / LOG).exists():
            shutil.copy(work / LOG, folder / LOG)
    took = time.perf_counter() - began
    made = Compressed(output, pruner.sparsity, score, scorer.name, before, took, pruner.errors)
    finish(folder, made)
    folder.rename(output)
    shutil.rmtree(work)
    return made


def _open_work(recipe: Recipe, output: Path) -> Path:
    if output.exists():
        raise FileExistsError(f"{output} exists; name another folder, or remove it")
    work = work_folder(output)
    if work.exists() and (work / FILE).is_file():
        if (work / FILE).read_text(encoding="utf-8") != recipe.to_toml():
            raise FileExistsError(
                f"{work} holds an unfinished run of another recipe; finish it with --recipe {work / FILE}, or remove it"
            )
        return work
    work.mkdir(parents=True, exist_ok=True)
    (work / FILE).write_text(recipe.to_toml(), encoding="utf-8")
    return work


def _features(recipe: Recipe, student: Encoder, training: list[Example]) -> tuple[list[Feature], list[Batch]]:
    """All training texts as features, and some in batches to calibrate with."""
    features = make_features(student, training, recipe.data.max_length)
    if not features:
        raise ValueError("no training row fits data.max_length; raise it")
    sample = random.Random(recipe.seed).sample(features, min(recipe.pruning.calibration, len(features)))
    total = list(accumulate(len(feature.ids) for feature in sample))
    sample = sample[: max(1, bisect_right(total, CALIBRATION_TOKENS))]
    return features, [batch for _, batch in in_order(sample, 64, student)]


def sensitivity_of(
    recipe: Recipe, grid: Sequence[float], progress: Progress
) -> tuple[dict[str, Curve], dict[str, tuple[int, int]]]:
    """What the model loses by pruning each dense layer to each sparsity of ``grid``, and the layers' ``(N, K)``."""
    torch.manual_seed(recipe.seed)
    with progress.phase("read data"):
        training, _ = examples_of(recipe)
    with progress.phase("load the model"):
        encoder = load_encoder(recipe.model, recipe.task, all_labels(training))
        encoder.model.to(device())
        _, calibration = _features(recipe, encoder, training)
    pruning = recipe.pruning
    block = Block.parse(pruning.block)
    with progress.phase("measure what layers lose", len(encoder.dense)) as advance:
        curves = measure_sensitivity(encoder, calibration, block, grid, pruning.sparsity, pruning.damping, advance)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in encoder.dense.items()}
    return curves, {name: shapes[name] for name in curves}


def _models(recipe: Recipe, training: list[Example]) -> tuple[Encoder, Encoder | None, Encoder]:
    """Student, teacher, and the dense model that the student's layers are compared with."""
    labels = all_labels(training)
    student = load_encoder(recipe.model, recipe.task, labels)
    teacher = None
    if recipe.teacher:
        if not has_head(recipe.teacher, recipe.task):
            raise ValueError(f"the teacher {recipe.teacher} has no head for {recipe.task}; fine-tune it first")
        teacher = load_encoder(recipe.teacher, recipe.task)
        _check_teacher(student, teacher, recipe)
    torch.manual_seed(recipe.seed)
    reference = (
        teacher if recipe.teacher == recipe.model and teacher else load_encoder(recipe.model, recipe.task, labels)
    )
    for encoder in (student, teacher, reference):
        if encoder is not None:
            encoder.model.to(device())
    return student, teacher, reference


def _check_teacher(student: Encoder, teacher: Encoder, recipe: Recipe) -> None:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {recipe.teacher} has another vocabulary than {recipe.model}; they must share one"
        )
    if student.labels != teacher.labels:
        raise ValueError(f"the teacher {recipe.teacher} has other labels than {recipe.model}")
    own, other = (
        (len(e.layers), int(e.model.config.hidden_size))  # type: ignore[union-attr, arg-type]
        for e in (student, teacher)
    )
    if own[1] != other[1] and recipe.task == "embedding":
        raise ValueError(f"the teacher's embeddings have {other[1]} channels, the model's {own[1]}; they must be equal")
    if own != other and recipe.distillation.states:
        raise ValueError(
            f"the teacher has {other[0]} layers of {other[1]} channels, the model {own[0]} of {own[1]}: "
            "set distillation.states to 0"
        )
