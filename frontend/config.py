"""Reads the JSON files beside a model, with errors that name the file, the field and the value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.files import read_json
from whet.passes.dialect import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Names that Hugging Face configurations use, and the dialect's."""


class Config:
    """One JSON object whose fields are read with checks; ``source`` is what errors call it."""

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{source} holds a {type(values).__name__}; expected an object with the model's fields")
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read the object in a JSON file."""
        return cls(read_json(path), str(path))

    def get(self, field: str, default: Any = None) -> Any:
        """Return the field's value, or ``default`` where it is absent or null."""
        value = self.values.get(field)
        return default if value is None else value

    def size(self, field: str) -> int:
        """Return a field that must be a positive integer."""
        value = self.values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.source}: {field} is {value!r}; expected a positive integer")
        return value

    def number(self, field: str, default: float) -> float:
        """Return a field that must be a positive number where it is present."""
        value = self.get(field, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{self.source}: {field} is {value!r}; expected a positive number")
        return float(value)

    def activation(self, field: str) -> Activation:
        """Return the activation that a field names; absent means GELU, as in BERT."""
        value = self.get(field, "gelu")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(f"{self.source}: {field} is {value!r}; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def require(self, field: str, expected: Any, why: str) -> None:
        """Refuse any other value than ``expected`` where the field is present and not empty."""
        value = self.values.get(field)
        if value is not None and value != expected and value not in ({}, []):
            raise ValueError(f"{self.source}: {field} is {value!r}; {why}")
