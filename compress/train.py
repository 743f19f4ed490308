"""The training loop: teacher, student, masks, checkpoints. Nothing in it depends on how often it was interrupted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from whet.progress import Progress

from .checkpoint import load_checkpoint, save_checkpoint
from .fake_quantise import fake_quantised
from .features import Batches, Feature, collate
from .hardware import autocast
from .losses import distance, run
from .models import Encoder
from .pruner import Pruner
from .recipe import Recipe
from .scores import Scorer

Log = Callable[[dict[str, Any]], None]

CLIP = 1.0
"""Largest norm of a step's gradient."""


def train(
    student: Encoder,
    teacher: Encoder | None,
    features: Sequence[Feature],
    pruner: Pruner,
    scorer: Scorer,
    recipe: Recipe,
    checkpoint: Path,
    progress: Progress,
    log: Log,
) -> None:
    """Prune and train the student in place; continues from ``checkpoint`` where that file exists.

    ``log`` gets a record at every evaluation: step, parts of the loss, sparsity, score, seconds left.
    """
    settings, weights = recipe.training, recipe.distillation
    steps = settings.steps
    if not steps:
        sparsity = pruner.due(0)
        if sparsity is not None:
            _prune(pruner, sparsity, progress)
        return
    if not settings.embeddings:
        student.model.base_model.get_submodule("embeddings").requires_grad_(False)  # type: ignore[operator]
    parameters = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )
    start = load_checkpoint(checkpoint, student.model, optimizer, pruner) if checkpoint.exists() else 0
    batches = Batches(features, settings.batch, recipe.seed)
    relations = weights.relations > 0 and teacher is not None
    sums: dict[str, float] = {}
    counted, began = 0, time.perf_counter()
    with progress.phase("train", steps) as advance:
        for step in range(start, steps):
            sparsity = pruner.due(step)
            if sparsity is not None:
                pruning = time.perf_counter()
                _prune(pruner, sparsity, None)
                pruner.forget(optimizer)
                began += time.perf_counter() - pruning  # the steps that are left take no such time
            batch = collate(batches[step], student)
            with autocast():
                with torch.no_grad():
                    wanted = run(teacher, batch, relations) if teacher is not None else None
                with fake_quantised(student) if settings.quantise else nullcontext():
                    made = run(student, batch, relations)
                parts = distance(made, wanted, batch, student, weights)
                loss = torch.stack(list(parts.values())).sum()
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss is {float(loss.detach())} at step {step}; lower training.learning_rate")
            loss.backward()
            pruner.after_backward()
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate((step + 1) / steps, settings.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            counted += 1
            advance(step + 1)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                save_checkpoint(checkpoint, step + 1, student.model, optimizer, pruner)
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == steps:
                left = (time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1)
                log(
                    {
                        "step": step + 1,
                        "loss": {name: total / counted for name, total in sums.items()},
                        "sparsity": pruner.sparsity,
                        "score": scorer(student),
                        "seconds_left": round(left),
                    }
                )
                sums, counted = {}, 0


def _prune(pruner: Pruner, sparsity: float, progress: Progress | None) -> None:
    if progress is None:
        pruner.prune(sparsity)
        return
    with progress.phase(f"prune to {sparsity:.1%}", len(pruner.dense)) as advance:
        pruner.prune(sparsity, advance)


def _rate(done: float, warmup: float) -> float:
    """Factor of the learning rate: up linearly, then down linearly to zero."""
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a log of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
