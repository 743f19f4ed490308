"""Writes the model as the exporter of 2022 did, which is the graph that Intel's Neural Engine recognises.

    python -m peers.neural_engine_export MODEL      # writes MODEL/old.onnx

transformers 4.18, torch 1.13, opset 11. The engine knows the classifier, not the QA head, so this is a classifier that
computes the QA logits of the first token: relu(y) − relu(−y) = y takes the head through the classifier's hidden layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification

OPSET = 11


def export(folder: Path) -> None:
    """Write ``old.onnx`` beside the weights."""
    config = DistilBertConfig.from_pretrained(folder)
    model = DistilBertForSequenceClassification(config).eval()
    weights = load_file(str(folder / "model.safetensors"))
    head, bias = weights.pop("qa_outputs.weight"), weights.pop("qa_outputs.bias")
    hidden, hidden_bias = torch.zeros(config.dim, config.dim), torch.zeros(config.dim)
    hidden[:4], hidden_bias[:4] = torch.cat([head, -head]), torch.cat([bias, -bias])
    last = torch.zeros(2, config.dim)
    last[:, :4] = torch.cat([torch.eye(2), -torch.eye(2)], 1)
    weights |= {
        "pre_classifier.weight": hidden,
        "pre_classifier.bias": hidden_bias,
        "classifier.weight": last,
        "classifier.bias": torch.zeros(2),
    }
    model.load_state_dict(weights)
    ids = torch.randint(1000, 30000, (1, 128))
    names = ["input_ids", "attention_mask"]
    part = folder / "old.part"
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        str(part),
        opset_version=OPSET,
        input_names=names,
        output_names=["logits"],
        do_constant_folding=True,
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in names},
    )
    part.rename(folder / "old.onnx")


if __name__ == "__main__":
    export(Path(sys.argv[1]))
