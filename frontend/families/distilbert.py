"""DistilBERT: BERT without token types, with names and configuration fields of its own (Sanh et al., 2019)."""

from __future__ import annotations

from ..config import Config
from .family import Family, Names, Sizes


def _sizes(config: Config) -> Sizes:
    return Sizes(
        vocab=config.size("vocab_size"),
        positions=config.size("max_position_embeddings"),
        types=0,
        hidden=config.size("dim"),
        intermediate=config.size("hidden_dim"),
        layers=config.size("n_layers"),
        heads=config.size("n_heads"),
        activation=config.activation("activation"),
        layer_norm_eps=1e-12,  # a constant of the family, not a field
    )


DISTILBERT = Family(
    model_type="distilbert",
    class_prefix="DistilBert",
    prefix="distilbert.",
    sizes=_sizes,
    names=Names(
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        token_type="",
        embedding_norm="embeddings.LayerNorm",
        layer="transformer.layer.{}.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        intermediate="ffn.lin1",
        output="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    pooled="pre_classifier",
    pooled_activation="relu",
    silent=("embeddings.position_ids",),
)
