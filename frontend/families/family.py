"""What the importer has to know about a model family: its sizes in the configuration and its tensors in the file.

A family here is an encoder of the BERT kind: sum of embeddings, then blocks of self-attention and feed-forward, each
followed by residual and layer norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whet.passes.dialect import Activation

from ..config import Config


@dataclass(frozen=True)
class Sizes:
    """Sizes and constants of one encoder, whatever its configuration calls them."""

    vocab: int
    positions: int
    types: int
    """Rows of the token type table; 0 in families without one."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    activation: Activation
    layer_norm_eps: float


@dataclass(frozen=True)
class Names:
    """Tensor names without ``.weight`` and ``.bias``; those of a layer stand behind ``layer`` with its number."""

    word: str
    position: str
    token_type: str
    """Empty in families without token types."""
    embedding_norm: str
    layer: str
    """Format string of a layer's prefix, e.g. ``"encoder.layer.{}."``."""
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str


@dataclass(frozen=True)
class Family:
    """One entry of the registry."""

    model_type: str
    """``model_type`` in config.json."""
    class_prefix: str
    """What its classes are called before ``Model``, ``ForSequenceClassification``, …"""
    prefix: str
    """What stands before the encoder's tensors in checkpoints that have a head."""
    sizes: Callable[[Config], Sizes]
    names: Names
    pooled: str
    """Dense layer between the first token's state and the sequence classifier, with prefix."""
    pooled_activation: Activation
    silent: tuple[str, ...] = ()
    """Tensors (endings or prefixes) that the file may hold and inference never needs."""

    def __post_init__(self) -> None:
        if not self.prefix.endswith(".") or "{}" not in self.names.layer:
            raise ValueError(f"family {self.model_type!r}: prefix must end with a dot and layer hold {{}}")
