"""BERT: also MiniLM, TinyBERT, the small BERTs and most sentence encoders (Devlin et al., 2019)."""

from __future__ import annotations

from ..config import Config
from .family import Family, Names, Sizes


def _sizes(config: Config) -> Sizes:
    config.require("position_embedding_type", "absolute", "only 'absolute' is supported")
    return Sizes(
        vocab=config.size("vocab_size"),
        positions=config.size("max_position_embeddings"),
        types=config.size("type_vocab_size"),
        hidden=config.size("hidden_size"),
        intermediate=config.size("intermediate_size"),
        layers=config.size("num_hidden_layers"),
        heads=config.size("num_attention_heads"),
        activation=config.activation("hidden_act"),
        layer_norm_eps=config.number("layer_norm_eps", 1e-12),
    )


BERT = Family(
    model_type="bert",
    class_prefix="Bert",
    prefix="bert.",
    sizes=_sizes,
    names=Names(
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        token_type="embeddings.token_type_embeddings",
        embedding_norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        intermediate="intermediate.dense",
        output="output.dense",
        output_norm="output.LayerNorm",
    ),
    pooled="bert.pooler.dense",
    pooled_activation="tanh",
    silent=("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias"),
)
