"""Imports Hugging Face models: a folder (config.json, safetensors, tokenizer) or a transformers model in memory.

Neither torch nor transformers is imported: a folder is read with safetensors and tokenizers, and a model in memory
only has to answer ``config.to_dict()`` and ``state_dict()``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from tokenizers import Tokenizer

from whet.passes.dialect import Activation, Pooling
from whet.tokenizer import clean_tokenizer, read_tokenizer

from .checkpoint import Weights, open_weights, state_weights
from .config import Config
from .encoder import Dense, Pool, Step, build_encoder
from .families import FAMILIES, Family, Sizes
from .model import Model, Task
from .sentence_transformers import SentenceTransformer, read_sentence_transformer

_HEADS: dict[str, Task] = {
    "Model": "hidden_states",
    "ForMaskedLM": "hidden_states",
    "ForPreTraining": "hidden_states",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
"""By the ending of the class that ``architectures`` names; language-model heads are left out, with a note."""

_NO_LENGTH = 1_000_000
"""Tokenizers without a limit write 1e30 or so as ``model_max_length``."""


def from_folder(path: str | Path, *, pooling: Pooling | None = None) -> Model:
    """Import a Hugging Face or sentence-transformers folder.

    ``pooling`` makes an embedding model of an encoder that has no head and declares no pooling. Raises ValueError
    (FileNotFoundError where ``path`` or its config.json is missing) naming the file, the field and what is expected.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with config.json and model.safetensors")
    declared = read_sentence_transformer(folder)
    inner = declared.transformer if declared else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"{inner} has no config.json; expected a Hugging Face model folder")
    config = Config.read(inner / "config.json")
    family = _family(config)  # before the weights are opened: what is unsupported is said first
    tokenizer = read_tokenizer(inner, lowercase=declared is not None and declared.lowercase)
    settings = inner / "tokenizer_config.json"
    limit = Config.read(settings).get("model_max_length") if settings.is_file() else None
    return _import(
        name=folder.resolve().name,
        config=config,
        family=family,
        weights=open_weights(inner),
        declared=declared,
        pooling=pooling,
        tokenizer=tokenizer,
        tokenizer_limit=limit,
    )


def from_transformers(model: Any, tokenizer: Any = None, *, pooling: Pooling | None = None) -> Model:
    """Import a transformers model that is in memory.

    ``tokenizer`` is a fast tokenizer of transformers, or a ``tokenizers.Tokenizer``. Raises as ``from_folder`` does.
    """
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise ValueError(f"{type(model).__name__} is not a transformers model; save it to a folder and compile that")
    name = type(model).__name__
    values = {**model.config.to_dict(), "architectures": [name]}
    config = Config(values, f"{name}.config")
    text = None
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with use_fast=True")
        text = clean_tokenizer(backend.to_str(), type(tokenizer).__name__)
    return _import(
        name=Path(str(getattr(model.config, "name_or_path", "") or name)).name,
        config=config,
        family=_family(config),
        weights=state_weights(model.state_dict(), name),
        declared=None,
        pooling=pooling,
        tokenizer=text,
        tokenizer_limit=getattr(tokenizer, "model_max_length", None),
    )


def _family(config: Config) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{config.source}: model_type is {model_type!r}; supported: {known} (or export it to ONNX)")
    config.require("is_decoder", False, "only encoders are supported")
    config.require("add_cross_attention", False, "only encoders are supported")
    config.require("pruned_heads", {}, "models with removed attention heads are not supported")
    config.require("quantization_config", {}, "give the float model; Whet quantises it itself")
    return FAMILIES[model_type]


def _import(
    *,
    name: str,
    config: Config,
    family: Family,
    weights: Weights,
    declared: SentenceTransformer | None,
    pooling: Pooling | None,
    tokenizer: str | None,
    tokenizer_limit: Any,
) -> Model:
    sizes = family.sizes(config)
    prefix = family.prefix if family.prefix + family.names.word + ".weight" in weights else ""
    task, notes = _task(config, family, weights, declared)
    labels = _labels(config, task)
    if declared is not None and declared.head:
        if pooling is not None:
            raise ValueError(f"pooling is {pooling!r}, but {name} declares its own in modules.json; leave it out")
        if declared.channels not in (None, sizes.hidden):
            raise ValueError(f"{name}: the pooling takes {declared.channels} channels; the encoder has {sizes.hidden}")
        task, labels, head = "embedding", (), declared.head
    elif pooling is not None:
        if task != "hidden_states":
            raise ValueError(f"pooling is {pooling!r}, but {name} has a head for {task}; leave it out")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
        task, head = "embedding", (Pool(pooling),)
    else:
        head = _head(task, family, prefix, sizes, weights, len(labels))
    module = build_encoder(sizes, family.names, prefix, weights, head)
    if tokenizer is None:
        notes.append("No tokenizer was found: the module takes token ids, not texts.")
    elif (tokens := Tokenizer.from_str(tokenizer).get_vocab_size()) > sizes.vocab:
        notes.append(f"The tokenizer has {tokens} tokens, the model {sizes.vocab}: texts with the others are refused.")
    return Model(
        name=name,
        module=module,
        task=task,
        dialect=True,
        inputs=("input_ids", "attention_mask", *(["token_type_ids"] if sizes.types else [])),
        vocab_size=sizes.vocab,
        max_length=_max_length(sizes, declared, tokenizer_limit),
        type_vocab_size=max(1, sizes.types),
        pad_token_id=int(config.get("pad_token_id", 0)),
        labels=labels,
        multi_label=len(labels) == 1 or config.get("problem_type") == "multi_label_classification",
        tokenizer_json=tokenizer,
        notes=(*notes, *(declared.notes if declared else ()), *_unused_notes(family, weights)),
    )


def _task(
    config: Config, family: Family, weights: Weights, declared: SentenceTransformer | None
) -> tuple[Task, list[str]]:
    architectures = config.get("architectures", [])
    if not architectures:
        heads = [name for name in ("classifier.weight", "qa_outputs.weight") if name in weights]
        if heads and not (declared and declared.head):
            expected = f"{family.class_prefix}ForSequenceClassification"
            raise ValueError(
                f"{config.source} names no architectures, but the weights hold {heads[0]}; name e.g. {expected}"
            )
        return "hidden_states", []
    architecture = str(architectures[0])
    suffix = architecture.removeprefix(family.class_prefix)
    if suffix not in _HEADS or suffix == architecture:
        supported = ", ".join(family.class_prefix + ending for ending in _HEADS)
        raise ValueError(f"{config.source}: architectures is {architecture!r}; supported: {supported}")
    left_out = _HEADS[suffix] == "hidden_states" and suffix != "Model"
    return _HEADS[suffix], [f"The language-model head of {architecture} is left out."] if left_out else []


def _head(task: Task, family: Family, prefix: str, sizes: Sizes, weights: Weights, labels: int) -> tuple[Step, ...]:
    def dense(tensor: str, n: int, name: str, activation: Activation = "none") -> Dense:
        weight, bias = weights.take(tensor + ".weight", (n, sizes.hidden)), weights.take(tensor + ".bias", (n,))
        return Dense(weight, bias, activation, name)

    match task:
        case "sequence_classification":
            pooled = dense(family.pooled, sizes.hidden, "pooled_dense", family.pooled_activation)
            return (Pool("cls"), pooled, dense("classifier", labels, "logits"))
        case "token_classification":
            return (dense("classifier", labels, "logits"),)
        case "question_answering":
            return (dense("qa_outputs", 2, "logits"),)
        case _:
            return ()


def _labels(config: Config, task: Task) -> tuple[str, ...]:
    if task not in ("sequence_classification", "token_classification"):
        return ()
    names = config.get("id2label")
    if names is None:
        count = config.size("num_labels") if config.get("num_labels") is not None else 2  # transformers' default
        return tuple(f"LABEL_{i}" for i in range(count))
    try:
        by_id = {int(key): str(value) for key, value in names.items()}
    except (AttributeError, TypeError, ValueError):
        by_id = {}
    if not by_id or sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"{config.source}: id2label is {names!r}; expected names for the ids 0, 1, 2, …")
    return tuple(by_id[i] for i in range(len(by_id)))


def _max_length(sizes: Sizes, declared: SentenceTransformer | None, tokenizer_limit: Any) -> int:
    limit = declared.max_length if declared else None
    if limit is None and isinstance(tokenizer_limit, (int, float)) and 0 < tokenizer_limit < _NO_LENGTH:
        limit = int(tokenizer_limit)
    return min(limit or sizes.positions, sizes.positions)


def _unused_notes(family: Family, weights: Weights) -> list[str]:
    unused = [name for name in weights.unused() if not name.endswith(family.silent)]
    if not unused:
        return []
    more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
    return [f"Unused tensors in {weights.source}: {', '.join(unused[:4])}{more}."]
