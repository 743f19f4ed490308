"""The recipe: everything that decides what a compression makes, as one small TOML file.

The same recipe on the same machine, with as many threads, makes the same bits. The version changes when an old file
would mean something else.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from .blocks import Block, Pooling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
FILE = "recipe.toml"
"""Its name in the folder of what it made."""
Task: TypeAlias = Literal["embedding", "sequence_classification", "token_classification", "question_answering"]
Method: TypeAlias = Literal["reconstruct", "magnitude", "movement", "snip_momentum", "lock"]
Budget: TypeAlias = Literal["layer", "global", "latency"]


@dataclass(frozen=True)
class Data:
    """Where the texts come from."""

    train: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    """More to distil from, by the teacher's answers alone."""
    development: tuple[str, ...] = ()
    """Scored while training; without any, a share of the training data is held out."""
    format: str = ""
    """Of the training files; by default each file's ending tells."""
    development_format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns, by what they mean."""
    limit: int = 0
    """Only the first training rows; 0: all."""
    max_length: int = 64
    """Tokens at which training texts are cut."""


@dataclass(frozen=True)
class Pruning:
    """Which blocks go, and when."""

    method: Method = "reconstruct"
    sparsity: float = 0.8
    block: str = "4x4"
    budget: Budget = "layer"
    pooling: Pooling = "mean"
    """Makes a block's score of its weights' scores (not of ``reconstruct``)."""
    updates: int = 1
    """How often blocks are chosen; sparsity grows with every time."""
    end: float = 0.5
    """Share of the training after which sparsity no longer grows."""
    calibration: int = 8192
    """Texts whose moments ``reconstruct`` uses."""
    damping: float = 0.01
    shares: dict[str, float] = field(default_factory=dict)
    """Sparsities of single dense layers (``"0.intermediate.dense"``), where they are not ``sparsity``."""


@dataclass(frozen=True)
class Distillation:
    """Weights of the parts of the loss."""

    labels: float = 0.0
    outputs: float = 1.0
    """Logits (Kullback-Leibler divergence), or embeddings (1 − cosine and in-batch similarities)."""
    states: float = 1.0
    """Each layer's output."""
    relations: float = 0.0
    """Query-query, key-key and value-value attention of the last layer."""
    temperature: float = 2.0


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    steps: int = 0
    """0: prune after training only."""
    batch: int = 64
    learning_rate: float = 3e-4
    warmup: float = 0.05
    """Share of the steps in which the learning rate grows; then it falls linearly to zero."""
    weight_decay: float = 0.01
    embeddings: bool = False
    """Whether the embedding tables are trained: they are most of a small model, and most rows are never seen."""
    quantise: bool = False
    """Whether the student computes with the rounding of its int8 module, to make up for it."""
    evaluate_every: int = 500
    checkpoint_every: int = 500


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a compression makes."""

    model: str
    task: Task
    teacher: str = ""
    """Empty: none."""
    seed: int = 0
    data: Data = field(default_factory=Data)
    pruning: Pruning = field(default_factory=Pruning)
    distillation: Distillation = field(default_factory=Distillation)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        p, t, d = self.pruning, self.training, self.distillation
        Block.parse(p.block)
        _expect("task", self.task, self.task in get_args(Task), f"one of {', '.join(get_args(Task))}")
        _expect("pruning.method", p.method, p.method in get_args(Method), f"one of {', '.join(get_args(Method))}")
        _expect("pruning.budget", p.budget, p.budget in get_args(Budget), f"one of {', '.join(get_args(Budget))}")
        _expect("pruning.pooling", p.pooling, p.pooling in get_args(Pooling), f"one of {', '.join(get_args(Pooling))}")
        _expect("pruning.sparsity", p.sparsity, 0 <= p.sparsity < 1, "a share of at least 0 and below 1")
        _expect("pruning.updates", p.updates, p.updates >= 1, "at least 1")
        _expect("pruning.end", p.end, 0 <= p.end <= 1, "a share of the training, 0 to 1")
        _expect("pruning.damping", p.damping, p.damping > 0, "more than 0")
        _expect("pruning.calibration", p.calibration, p.calibration >= 1, "at least 1 text")
        for name, value in p.shares.items():
            _expect(f"pruning.shares.{name}", value, 0 <= value < 1, "a share of at least 0 and below 1")
        if p.shares and p.budget == "global":
            raise ValueError("pruning.shares are given, but pruning.budget is 'global'; leave one of them out")
        for name, value in (("steps", t.steps), ("limit", self.data.limit), ("seed", self.seed)):
            _expect(name, value, value >= 0, "at least 0")
        for name in ("batch", "evaluate_every", "checkpoint_every"):
            _expect(f"training.{name}", getattr(t, name), getattr(t, name) >= 1, "at least 1")
        _expect("data.max_length", self.data.max_length, self.data.max_length >= 8, "at least 8 tokens")
        _expect("training.learning_rate", t.learning_rate, t.learning_rate > 0, "more than 0")
        _expect("training.warmup", t.warmup, 0 <= t.warmup < 1, "a share of the training, below 1")
        _expect("distillation.temperature", d.temperature, d.temperature > 0, "more than 0")
        weights = {name: getattr(d, name) for name in ("labels", "outputs", "states", "relations")}
        for name, value in weights.items():
            _expect(f"distillation.{name}", value, value >= 0, "at least 0")
        if p.method == "reconstruct" and p.budget == "global":
            raise ValueError(
                "pruning.budget is 'global', but reconstruct prunes layer after layer; use 'layer' or 'latency'"
            )
        if p.method in ("movement", "snip_momentum") and p.sparsity and not t.steps:
            raise ValueError(
                f"pruning.method is {p.method!r}, which needs gradients: give training.steps, or use reconstruct"
            )
        if t.steps and not self.teacher and not d.labels:
            raise ValueError("there is neither a teacher nor a weight for labels to train with; give one of them")
        if t.steps and not any(value for name, value in weights.items() if self.teacher or name == "labels"):
            raise ValueError("every weight of distillation is 0; give at least one")
        if self.data.unlabelled and self.task == "embedding":
            raise ValueError("data.unlabelled is given, but embeddings need no labels; name all texts in data.train")
        if self.data.unlabelled and t.steps and not (self.teacher and (d.outputs or d.states or d.relations)):
            raise ValueError(
                "data.unlabelled is given, but no teacher, or no weight of distillation, to learn its answers with"
            )
        if self.task == "embedding" and d.labels:
            raise ValueError(
                "distillation.labels is given, but embeddings are distilled from texts without labels; use 0"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a TOML file; ValueError names a field that is wrong or unknown."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path}: version is {version!r}; this Whet reads recipes of version {VERSION}")
        try:
            return cls.from_table(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_table(cls, values: dict[str, Any]) -> Recipe:
        """Make a recipe of nested tables, without the version; ValueError names a field that is wrong or unknown."""
        made: Recipe = _from_table(cls, values, "")
        return made

    def to_table(self) -> dict[str, Any]:
        """The recipe as nested tables, as ``from_table`` takes it."""
        return {k: _plain(v) for k, v in asdict(self).items()}

    def to_toml(self) -> str:
        """The recipe as TOML, every field given."""
        tables = {name: value for name, value in asdict(self).items() if isinstance(value, dict)}
        lines = [f"version = {VERSION}"]
        lines += [f"{name} = {_toml(value)}" for name, value in asdict(self).items() if name not in tables]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _from_table(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{prefix}{unknown[0]} is no field of a recipe; expected some of {', '.join(sorted(names))}")
    made = {name: _from_value(types[name], value, f"{prefix}{name}") for name, value in values.items()}
    if missing := [n for n in ("model", "task") if n in names and n not in made]:
        raise ValueError(f"{missing[0]} is missing")
    return kind(**made)


def _from_value(kind: Any, value: Any, name: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}; expected a table")
        return _from_table(kind, value, f"{name}.")
    origin = get_origin(kind) or kind
    plain = {tuple: list, Literal: str, dict: dict}.get(origin, origin)
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is not plain or (plain is list and not all(isinstance(v, str) for v in value)):
        raise ValueError(f"{name} is {value!r}; expected a {'list of texts' if plain is list else plain.__name__}")
    if plain is dict:
        return {k: _from_value(get_args(kind)[1], v, f"{name}.{k}") for k, v in value.items()}
    return tuple(value) if origin is tuple else value


def parse_value(text: str) -> Any:
    """A value as TOML has it; what is none is a text without its quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(c if c not in '"\\' and c >= " " and c != "\x7f" else f"\\u{ord(c):04X}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
