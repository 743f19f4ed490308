"""torch.compile, fp32 and bf16, of the Hugging Face model with scaled-dot-product attention; one graph per shape."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers

from .protocol import Array, Bind, Step, serve

os.environ["TORCHINDUCTOR_FREEZING"] = "1"
SHAPES = 64
"""Graphs that are kept for one case."""


def load(folder: Path, variant: str, threads: int, backend: str = "inductor") -> Bind:
    """Load the weights; ``variant`` is their type."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = SHAPES
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant]
    model = transformers.DistilBertForQuestionAnswering.from_pretrained(folder, dtype=dtype).eval()

    def forward(ids: Array, mask: Array) -> Array:
        return model.qa_outputs(model.distilbert(input_ids=ids, attention_mask=mask)[0])

    compiled = torch.compile(forward, backend=backend, dynamic=False)

    def bind(ids: Array, mask: Array) -> Step:
        inputs = torch.from_numpy(ids), torch.from_numpy(mask)

        def step() -> Array:
            with torch.no_grad():
                return compiled(*inputs).float()

        return step

    return bind


if __name__ == "__main__":
    serve(load, torch.__version__, forget=torch._dynamo.reset)
