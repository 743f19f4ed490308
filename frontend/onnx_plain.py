"""Turns an ONNX graph that is not an encoder into plain Relax, through TVM's importer.

The graph is cleaned before: TVM's importer loses shapes in quantised graphs and in shape arithmetic. Constants are
folded, and quantised arithmetic becomes the fp32 arithmetic that it stands for (no rounding, weights dequantised).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from tvm import IRModule
from tvm.relax.frontend import onnx as importer


def plain_module(model: onnx.ModelProto, path: Path, outputs: Sequence[str]) -> IRModule:
    """A Relax function of the file's inputs."""
    return importer.from_onnx(model)
