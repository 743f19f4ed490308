"""Imports ONNX files: fp32, fused by ONNX Runtime's optimiser, dynamically or statically quantised.

The graph is raised to the encoder dialect (onnx_walk.py); if it is not an encoder, it becomes plain Relax
(onnx_plain.py).
Beside the file are read: the tokenizer, ``config.json`` (labels), and what a sentence-transformers folder declares,
which completes files that end at the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from whet.passes.dialect import Pooling
from whet.passes.raise_encoder import raise_encoder
from whet.passes.raise_facts import Fact, Known, Linear, Matrix, NotAnEncoder, Op, Probes, Tokens
from whet.passes.raise_facts import Node as Raised
from whet.passes.raise_rules import Rules
from whet.tokenizer import read_tokenizer

from . import onnx_contrib, onnx_ops, onnx_quantised  # noqa: F401 - they register their rules
from .config import Config
from .encoder import Dense, Pool, Step
from .model import Model, Task
from .onnx_graph import inputs_of, open_model, static_dims
from .onnx_plain import plain_module
from .onnx_walk import Walk
from .sentence_transformers import SentenceTransformer, read_sentence_transformer

_PREFERRED = ("sentence_embedding", "logits", "last_hidden_state")
"""Outputs to take where the caller names none and there are several, the best first; else the first."""

_PER_REQUEST: tuple[Task, ...] = ("embedding", "sequence_classification")

_PLAIN_LENGTH = 512
"""Longest request of a graph that is not recognised, if neither it nor the tokenizer says: BERT's."""

_NO_LENGTH = 1_000_000
"""Tokenizers without a limit write 1e30 or so as ``model_max_length``."""


def from_onnx(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    task: Task | None = None,
    output: str | None = None,
    pooling: Pooling | None = None,
) -> Model:
    """Import an ONNX file.

    ``tokenizer`` is the folder that holds it (default: the file's own). ``task`` and ``output`` override the guess from
    the names and shapes of the outputs. ``pooling`` makes an embedding model of hidden states. Raises FileNotFoundError
    or ValueError naming the file, the input or the node, and what is expected.
    """
    path = Path(path)
    for name, value, allowed in (("task", task, get_args(Task)), ("pooling", pooling, get_args(Pooling))):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    model = open_model(path)
    folder = _Folder.of(path, None if tokenizer is None else Path(tokenizer))
    inputs = _inputs(model, path, int(folder.config.get("pad_token_id", 0)))
    declared, notes = _outputs(model, path, output, task)
    outputs = [_logits(model, name) for name in declared]
    if folder.tokenizer is None:
        notes.append("No tokenizer was found: the module takes token ids, not texts.")
    common: dict[str, Any] = {
        "name": path.resolve().parent.name if path.stem == "model" else path.stem,
        "inputs": tuple(value.name for value in inputs_of(model.graph)),
        "pad_token_id": int(folder.config.get("pad_token_id", 0)),
        "tokenizer_json": folder.tokenizer,
    }
    try:
        rules = Rules(inputs.probes)
        facts = [rules.settle(fact) for fact in Walk(model, rules).run(inputs.values, outputs)]
        head = _head(folder.declared, pooling, task, facts, path)
        encoder = raise_encoder(rules, [_with_head(fact, head) for fact in facts])
    except NotAnEncoder as reason:
        if pooling is not None:
            raise ValueError(f"{path} is not recognised as an encoder, so it can't be pooled: {reason}") from None
        notes.append(f"Not recognised as an encoder; stays plain Relax operators in fp32: {reason}.")
        try:
            module = plain_module(model, declared)
        except ValueError as error:
            raise ValueError(f"{path} is not recognised as an encoder ({reason}), and {error}") from error
        return Model(
            module=module,
            task=task or _guess(declared, per_request=_rank(model, declared[0]) == 2, channels=0, hidden=0),
            dialect=False,
            vocab_size=_vocab_size(model, inputs.ids),
            max_length=min(folder.limit, inputs.sequence or _PLAIN_LENGTH),
            type_vocab_size=0,
            notes=tuple(notes),
            **common,
        )
    if outputs != declared:
        notes.append(f"The softmax or sigmoid before output {declared[0]!r} is left out: the module returns logits.")
    found = "embedding" if head else _guess(declared, encoder.per_request, encoder.channels, encoder.hidden)
    if found == "question_answering" and "TokenClassification" in str(folder.config.get("architectures", "")):
        found = "token_classification"
    found = task or found
    if (found in _PER_REQUEST) != encoder.per_request:
        per = "request" if encoder.per_request else "token"
        raise ValueError(
            f"{path}: task is {found!r}, but output {declared[0]!r} is per {per}; name another output, or give pooling"
        )
    return Model(
        module=encoder.module,
        task=found,
        dialect=True,
        vocab_size=encoder.vocab_size,
        max_length=min(folder.limit, encoder.max_length),
        type_vocab_size=encoder.type_vocab_size,
        labels=_labels(folder.config, found, encoder.channels),
        multi_label=encoder.channels == 1 or folder.config.get("problem_type") == "multi_label_classification",
        notes=(*notes, *rules.notes, *(folder.declared.notes if folder.declared and head else ())),
        **common,
    )


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Inputs:
    ids: str
    probes: Probes
    values: dict[str, Fact]
    sequence: int | None


def _inputs(model: onnx.ModelProto, path: Path, pad: int) -> _Inputs:
    """The inputs at the probes; ValueError where none holds token ids."""
    declared = inputs_of(model.graph)
    roles = {value.name: _role(value.name, len(declared)) for value in declared}
    ids = next((value for value in declared if roles[value.name] == "ids"), None)
    if ids is None or len(static_dims(ids)) != 2:
        names = ", ".join(roles) or "none"
        raise ValueError(f"{path} has no input of token ids (batch, sequence), e.g. input_ids; its inputs are: {names}")
    batch, sequence = static_dims(ids)
    probes = Probes.of(batch, sequence, pad)
    arrays = {"ids": probes.ids, "mask": probes.mask, "types": probes.token_types, "positions": probes.positions}
    values: dict[str, Fact] = {}
    for value in declared:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type or onnx.TensorProto.INT64)
        role = roles[value.name]
        if role is not None:
            values[value.name] = Known(tuple(array.astype(dtype) for array in arrays[role]))
    return _Inputs(ids.name, probes, values, sequence)


def _vocab_size(model: onnx.ModelProto, ids: str) -> int:
    """Rows of the first table that is read at the token ids; 0 if there is none."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    tables = [node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] == ids]
    return next((int(rows[table]) for table in tables if table in rows), 0)


def _role(name: str, inputs: int) -> str | None:
    lower = name.lower()
    for role, words in (("mask", ("mask",)), ("types", ("type", "segment")), ("positions", ("position",))):
        if any(word in lower for word in words):
            return role
    return "ids" if "id" in lower or "token" in lower or inputs == 1 else None


# -------------------------------------------------------------------------------------------------------------- outputs


def _outputs(model: onnx.ModelProto, path: Path, output: str | None, task: Task | None) -> tuple[list[str], list[str]]:
    """The values to compute, and notes about those that are not."""
    names = [value.name for value in model.graph.output]
    if output is not None and output not in names:
        raise ValueError(f"{path}: output is {output!r}; expected one of {', '.join(names)}")
    ends = [next((n for n in names if word in n.lower()), None) for word in ("start", "end")]
    if output is not None:
        chosen = [output]
    elif task in (None, "question_answering") and ends[0] is not None and ends[1] is not None:
        chosen = [ends[0], ends[1]]
    else:
        pooled = ("sentence_embedding", "pooler_output") if task == "embedding" else ()
        hidden = ("last_hidden_state", "token_embeddings") if task == "hidden_states" else ()
        chosen = [next((n for n in (*hidden, *pooled, *_PREFERRED) if n in names), names[0])]
    notes = []
    if unused := [n for n in names if n not in chosen]:
        notes.append(f"Output {' and '.join(chosen)} is computed; left out: {', '.join(unused)}.")
    return chosen, notes


def _logits(model: onnx.ModelProto, output: str) -> str:
    """What an output is before a final softmax or sigmoid."""
    node = next((node for node in model.graph.node if output in node.output), None)
    if node is None or node.op_type not in ("Softmax", "LogSoftmax", "Sigmoid"):
        return output
    return str(node.input[0])


def _guess(outputs: Sequence[str], per_request: bool, channels: int, hidden: int) -> Task:
    """The task by the names and the shape of the outputs."""
    name = outputs[0].lower()
    logits = any(word in name for word in ("logit", "output_label", "scores", "prob")) or channels not in (0, hidden)
    if per_request:
        return "sequence_classification" if logits and "embedding" not in name else "embedding"
    if len(outputs) == 2 or (channels == 2 and "hidden" not in name):
        return "question_answering"
    return "token_classification" if logits else "hidden_states"


def _rank(model: onnx.ModelProto, output: str) -> int | None:
    value = next((v for v in model.graph.output if v.name == output), None)
    return None if value is None else len(static_dims(value))


def _labels(config: Config, task: Task, channels: int) -> tuple[str, ...]:
    if task not in ("sequence_classification", "token_classification"):
        return ()
    names = config.get("id2label", {})
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(channels))


# ----------------------------------------------------------------------------------------------------------------- head


def _head(
    declared: SentenceTransformer | None, pooling: Pooling | None, task: Task | None, facts: list[Tokens], path: Path
) -> Sequence[Step]:
    """What turns hidden states into embeddings, where the file stops before."""
    ends_at_hidden = len(facts) == 1 and not facts[0].node.per_request and not isinstance(facts[0].node, Linear)
    if pooling is not None:
        if not ends_at_hidden:
            raise ValueError(f"pooling is {pooling!r}, but the output of {path} is not hidden states; leave it out")
        return (Pool(pooling),)
    return declared.head if declared and ends_at_hidden and task in (None, "embedding") else ()


def _with_head(tokens: Tokens, head: Sequence[Step]) -> Tokens:
    for step in head:
        node, axes = tokens.node, tokens.axes
        if isinstance(step, Pool):
            raised: Raised = Op(node.channels, True, "pool", (node,), {"mode": step.mode})
            axes = (axes[0], axes[-1])
        elif isinstance(step, Dense):
            matrix = Matrix(np.asarray(step.weight, np.float32))
            raised = Linear(len(step.bias), True, node, matrix, np.asarray(step.bias), step.activation, step.name)
        else:
            raised = Op(node.channels, True, "normalize", (node,))
        tokens = replace(tokens, node=raised, axes=axes)
    return tokens


# --------------------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class _Folder:
    """What lies beside the file. ``limit``: the longest request by the tokenizer's settings."""

    tokenizer: str | None
    config: Config
    declared: SentenceTransformer | None
    limit: int

    @staticmethod
    def of(path: Path, tokenizer: Path | None) -> _Folder:
        if tokenizer is not None and not tokenizer.exists():
            raise FileNotFoundError(f"{tokenizer} does not exist; expected the folder of a tokenizer")
        own = path.resolve().parent
        # Published folders keep their exports in a sub-folder: onnx/model.onnx.
        folders = [tokenizer if tokenizer.is_dir() else tokenizer.parent] if tokenizer else [own, own.parent]
        folders = folders if tokenizer or own.name == "onnx" else folders[:1]

        def config(name: str) -> Config:
            found = next((folder / name for folder in folders if (folder / name).is_file()), None)
            return Config.read(found) if found else Config({}, name)

        declared = next((d for folder in folders if (d := read_sentence_transformer(folder)) is not None), None)
        lower = declared is not None and declared.lowercase
        text = next((t for folder in folders if (t := read_tokenizer(folder, lowercase=lower)) is not None), None)
        if tokenizer is not None and text is None:
            raise ValueError(f"{tokenizer} holds neither tokenizer.json nor vocab.txt")
        limits = [declared.max_length if declared else None, config("tokenizer_config.json").get("model_max_length")]
        limit = next((int(n) for n in limits if isinstance(n, int | float) and 0 < n < _NO_LENGTH), _NO_LENGTH)
        return _Folder(text, config("config.json"), declared, limit)
