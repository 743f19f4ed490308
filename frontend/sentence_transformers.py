"""Reads what a sentence-transformers folder declares after the encoder: pooling, dense layers, normalisation.

``modules.json`` lists the modules in order, each with its folder and its Python class. Only the last part of the class
is looked at (it moved between packages over the versions), and nothing of it is ever imported. Versions before 6 say
``pooling_mode_mean_tokens: true``, later ones ``pooling_mode: "mean"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, get_args

import numpy as np

from whet.files import read_json
from whet.passes.dialect import Activation, Pooling

from .checkpoint import open_weights
from .config import Config
from .encoder import Dense, Normalize, Pool, Step

_DENSE_ACTIVATIONS: dict[str, Activation] = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceTransformer:
    """What ``modules.json`` and the files it names declare."""

    transformer: Path
    """Folder of the encoder."""
    head: tuple[Step, ...]
    """Steps after the encoder; empty where nothing is pooled (a cross-encoder)."""
    channels: int | None
    """Channels that the pooling expects from the encoder, where it says so."""
    max_length: int | None
    lowercase: bool
    notes: tuple[str, ...]


def read_sentence_transformer(folder: Path) -> SentenceTransformer | None:
    """Read the declaration of a folder; None where it has no ``modules.json``, ValueError where it is unsupported."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_json(path)
    if not isinstance(modules, list) or not modules or not all(isinstance(m, Mapping) for m in modules):
        raise ValueError(f"{path} is not a list of modules")
    first, *rest = sorted(modules, key=lambda module: int(module.get("idx", 0)))
    if _kind(first) != "Transformer":
        raise ValueError(f"{path}: the first module is {first.get('type')!r}; expected a Transformer")
    transformer = _module_folder(folder, first)
    head: list[Step] = []
    channels: int | None = None
    for module in rest:
        inner = _module_folder(folder, module)
        match _kind(module):
            case "Pooling":
                config = Config.read(inner / "config.json")
                channels = config.get("embedding_dimension", config.get("word_embedding_dimension"))
                head.append(Pool(_pooling(config)))
            case "Dense":
                head.append(_dense(inner, f"dense_{len(head)}"))
            case "Normalize":
                head.append(Normalize())
            case "Dropout":
                pass  # inactive in inference
            case _:
                raise ValueError(f"{path}: module {module.get('type')!r} is not supported; known: {_KNOWN}")
    if head and not isinstance(head[0], Pool):
        raise ValueError(f"{path}: the module after the Transformer is not a Pooling; expected one of {_KNOWN}")
    settings = transformer / "sentence_bert_config.json"
    config = Config.read(settings) if settings.is_file() else Config({}, str(settings))
    return SentenceTransformer(
        transformer=transformer,
        head=tuple(head),
        channels=channels,
        max_length=config.size("max_seq_length") if config.get("max_seq_length") is not None else None,
        lowercase=bool(config.get("do_lower_case", False)),
        notes=_prompt_notes(folder),
    )


_KNOWN = "Transformer, Pooling, Dense, Normalize, Dropout"


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _module_folder(folder: Path, module: Mapping[str, Any]) -> Path:
    name = str(module.get("path", ""))
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"{folder / 'modules.json'}: the module path {name!r} leaves the folder")
    return folder / name


def _pooling(config: Config) -> Pooling:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for field, name in _LEGACY_MODES.items() if config.get(field)] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    supported: tuple[Pooling, ...] = get_args(Pooling)
    for name in supported:
        if mode == name:
            return name
    raise ValueError(f"{config.source}: pooling_mode is {mode!r}; supported: one of {', '.join(supported)}")


def _dense(folder: Path, name: str) -> Dense:
    config = Config.read(folder / "config.json")
    declared = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _DENSE_ACTIVATIONS.get(declared.rpartition(".")[2])
    if activation is None:
        supported = ", ".join(_DENSE_ACTIVATIONS)
        raise ValueError(f"{config.source}: activation_function is {declared!r}; supported: {supported}")
    n, k = config.size("out_features"), config.size("in_features")
    weights = open_weights(folder)
    weight = weights.take("linear.weight", (n, k))
    bias = weights.take("linear.bias", (n,)) if config.get("bias", True) else np.zeros(n, np.float32)
    return Dense(weight, bias, activation, name)


def _prompt_notes(folder: Path) -> tuple[str, ...]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return ()
    config = Config.read(path)
    name = config.get("default_prompt_name")
    prompts = config.get("prompts", {})
    prompt = prompts.get(name) if isinstance(prompts, Mapping) else None
    return (f"The default prompt {prompt!r} is not put before texts; callers add it.",) if prompt else ()
