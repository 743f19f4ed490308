"""Intel's Neural Engine (intel-extension-for-transformers 1.4.2), the runtime of "Fast DistilBERT on CPUs".

Variants: "int8"; "int8 sparse", which runs layers of at least 70 % zeros in blocks of 4 outputs × 1 input with its
sparse kernels. It reads the graph that ``peers.neural_engine_export`` writes. Its output is the first token's logits.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from .calibration import batches
from .protocol import Array, Bind, Step, serve

SPARSE_FROM = 0.7
BLOCK = 4
TOKENS = 32
"""The sparse kernels end the process where a request has another multiple of tokens; it is padded."""
CODES = "intel_extension_for_transformers.transformers"
RELEASE = "1.4.2"


def load(folder: Path, variant: str, threads: int) -> Bind:
    """Compile the graph; it runs any shape."""
    if variant not in ("int8", "int8 sparse"):
        raise ValueError(f"variant is {variant!r}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GLOG_minloglevel", "2")
    path = folder / "neural_engine int8.onnx"
    if not path.exists():
        part = path.with_suffix(".part")
        quantise(folder / "old.onnx", part)
        part.rename(path)
    graph = engine()(str(path))
    restore_scales(graph)
    width = 1
    if variant == "int8 sparse":
        width = TOKENS
        graph.transpose_mode_int8([n.name for n in graph.nodes if is_sparse(n)])

    def bind(ids: Array, mask: Array) -> Step:
        padding = -ids.shape[1] % width
        inputs = [np.pad(a, ((0, 0), (0, padding))).astype(np.int32) for a in (ids, mask)]
        return lambda: next(iter(graph.inference(inputs).values()))

    return bind


def engine() -> Any:
    """The graph compiler alone: the package around it wants torch and releases of others that are long gone."""
    spec = find_spec("intel_extension_for_transformers")
    if spec is None or spec.origin is None:
        raise ImportError("intel_extension_for_transformers is not installed")
    package = types.ModuleType(CODES)
    package.__path__ = [str(Path(spec.origin).parent / "transformers")]
    sys.modules[CODES] = package
    return import_module(f"{CODES}.runtime.compile").compile


def quantise(source: Path, target: Path) -> None:
    """QDQ around every MatMul but the head's."""
    nodes = onnx.load(source).graph.node
    quantize_static(
        source,
        target,
        Calibration(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,  # per tensor, the engine's answers are 0
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        nodes_to_exclude=[n.name for n in nodes if any("classifier" in i for i in (n.name, *n.input))],
        extra_options={
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "AddQDQPairToWeight": False,
        },
    )


def restore_scales(graph: Any) -> None:
    """Give P·V the range of V again, which this release's compiler loses."""
    for node in graph.nodes:
        if node.op_type == "Matmul" and node.attr.get("output_dtype") == "u8" and len(node.input_tensors) == 6:
            maker = graph.get_node_by_name(node.input_tensors[1].source_op[0])
            name = maker.output_tensors[0].name
            for at, end in ((4, "_min"), (5, "_max")):
                node.input_tensors.insert(at, next(t for t in maker.input_tensors if t.name == name + end))


def is_sparse(node: Any) -> bool:
    """Whether the engine's sparse kernel pays for this layer."""
    if node.op_type != "InnerProduct" or node.attr.get("append_op") == "tanh":
        return False
    weight = node.input_tensors[1].data
    if not isinstance(weight, np.ndarray) or weight.dtype not in (np.int8, np.uint8):
        return False
    blocks = weight.reshape(len(weight), -1, BLOCK)
    return bool((blocks == 0).all(axis=2).mean() >= SPARSE_FROM)


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Random requests, as every engine is calibrated with."""

    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Array]] = iter(batches())

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, or None after the last."""
        return next(self.batches, None)


if __name__ == "__main__":
    serve(load, RELEASE)
