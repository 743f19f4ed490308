"""Make a recipe of a few options: what is not said depends on the task, the model and how much is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .folders import has_head
from .recipe import Pruning, Recipe, parse_value

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
