"""Hugging Face folders of a given shape with seeded random weights: speed depends on shapes and zeros alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from whet.passes.prune_blocks import prune

SHAPES: dict[str, dict[str, int]] = {
    "distilbert-base": {"layers": 6, "hidden": 768, "heads": 12, "inner": 3072},
    "minilm-l6": {"layers": 6, "hidden": 384, "heads": 12, "inner": 1536},
}
VOCAB = 30522
POSITIONS = 512


def make_model(folder: Path, shape: str, sparsity: float = 0.0, block_rows: int = 4) -> Path:
    """Write a DistilBERT of ``shape`` with a QA head, whose dense layers have lost ``sparsity`` of their blocks."""
    sizes = SHAPES[shape]
    hidden, inner = sizes["hidden"], sizes["inner"]
    random = np.random.default_rng(1234)
    tensors: dict[str, np.ndarray[Any, Any]] = {}

    def dense(name: str, rows: int, columns: int, sparse: bool = True) -> None:
        weight = random.normal(0, 0.02, (rows, columns)).astype(np.float32)
        tensors[name + ".weight"] = prune(weight, sparsity, block_rows) if sparse and sparsity else weight
        tensors[name + ".bias"] = random.normal(0, 0.02, rows).astype(np.float32)

    def norm(name: str) -> None:
        tensors[name + ".weight"] = random.normal(1, 0.05, hidden).astype(np.float32)
        tensors[name + ".bias"] = random.normal(0, 0.02, hidden).astype(np.float32)

    for table, rows in (("word", VOCAB), ("position", POSITIONS)):
        values = random.normal(0, 0.02, (rows, hidden)).astype(np.float32)
        tensors[f"distilbert.embeddings.{table}_embeddings.weight"] = values
    norm("distilbert.embeddings.LayerNorm")
    for i in range(sizes["layers"]):
        layer = f"distilbert.transformer.layer.{i}."
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            dense(f"{layer}attention.{part}", hidden, hidden)
        norm(layer + "sa_layer_norm")
        dense(layer + "ffn.lin1", inner, hidden)
        dense(layer + "ffn.lin2", hidden, inner)
        norm(layer + "output_layer_norm")
    dense("qa_outputs", 2, hidden, sparse=False)

    config = {
        "model_type": "distilbert",
        "architectures": ["DistilBertForQuestionAnswering"],
        "activation": "gelu",
        "dim": hidden,
        "hidden_dim": inner,
        "n_heads": sizes["heads"],
        "n_layers": sizes["layers"],
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors")
    return folder
