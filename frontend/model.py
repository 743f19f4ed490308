"""What every importer returns: the graph and what a user of the model has to know beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tvm import IRModule

Task: TypeAlias = Literal[
    "embedding", "sequence_classification", "token_classification", "question_answering", "hidden_states"
]


@dataclass(frozen=True)
class Model:
    """An imported model.

    ``module["main"]`` is either in the encoder dialect (``dialect``: parameters ids, positions, token_types
    ``(tiles, 16)`` int32 and segments ``(groups, 16, 2)`` int32, see whet.passes.dialect) or, where the source was not
    recognised, a plain Relax function of ``(batch, sequence)`` int64 inputs named in ``inputs``.
    """

    name: str
    module: IRModule
    task: Task
    dialect: bool
    inputs: tuple[str, ...]
    """Inputs of the source model, in its order, e.g. ``("input_ids", "attention_mask", "token_type_ids")``."""
    vocab_size: int
    max_length: int
    """Longest request in tokens, special tokens included (the tokenizer truncates to it)."""
    type_vocab_size: int
    pad_token_id: int = 0
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    """Whether a text can have several labels at once: scores are then sigmoids, else a softmax."""
    tokenizer_json: str | None = None
    """Contents of ``tokenizer.json``, without padding and truncation settings."""
    notes: tuple[str, ...] = field(default=())
    """What stayed plain, what was ignored, and why: one sentence each, shown by ``whet explain``."""
