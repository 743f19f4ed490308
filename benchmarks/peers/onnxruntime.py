"""ONNX Runtime: fp32, dynamic int8 and static QDQ int8, each of the plain graph and of the one its optimiser makes.

Variants: "fp32", "int8 dynamic", "int8 static", and each with " optimised" (`onnxruntime.transformers.optimizer`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions

from .calibration import batches
from .protocol import Array, Bind, Step, serve

HEAD = "logits"
"""Stays fp32, as in every other engine."""


def load(folder: Path, variant: str, threads: int) -> Bind:
    """Open a session that runs batches of any shape."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    path = made(folder, variant)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def bind(ids: Array, mask: Array) -> Step:
        inputs = {"input_ids": ids, "attention_mask": mask}
        return lambda: session.run(None, inputs)[0]

    return bind


def made(folder: Path, variant: str) -> Path:
    """The file of a variant, written if it is not there."""
    path = folder / f"onnxruntime {variant}.onnx"
    if variant == "fp32":
        return folder / "fp32.onnx"
    if path.exists():
        return path
    part = path.with_suffix(".part")
    optimised = variant.endswith(" optimised")
    source = made(folder, "fp32 optimised") if optimised and variant != "fp32 optimised" else folder / "fp32.onnx"
    match variant.removesuffix(" optimised"):
        case "fp32":
            optimise(source, part)
        case "int8 dynamic":
            quantize_dynamic(
                source,
                part,
                op_types_to_quantize=["MatMul", "Attention"],
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[n.name for n in matmuls(source) if is_head(n)],
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        case "int8 static":
            quantise_static(source, part)
        case _:
            raise ValueError(f"variant is {variant!r}")
    part.rename(path)
    return path


def optimise(source: Path, target: Path) -> None:
    """Fuse attention, GELU and layer norm, as the optimiser for BERT does."""
    config = json.loads((source.parent / "config.json").read_text())
    model = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=config["n_heads"],
        hidden_size=config["dim"],
        opt_level=0,
        optimization_options=fusions(),
    )
    print({k: v for k, v in model.get_fused_operator_statistics().items() if v})
    model.save_model_to_file(str(target))
    # Without the types of contributed ops, quantize_static skips their readers in silence.
    onnx.save(SymbolicShapeInference.infer_shapes(onnx.load(target), auto_merge=True), target)


def fusions() -> Any:
    """MultiHeadAttention rather than Attention: only there the projections stay MatMuls, which QDQ can quantise."""
    options = FusionOptions("bert")
    options.use_multi_head_attention = True
    return options


def quantise_static(source: Path, target: Path) -> None:
    """QDQ around every MatMul with a weight, outputs left fp32: those fuse to MatMulIntegerToFloat."""
    constants = {i.name for i in onnx.load(source).graph.initializer}
    skipped = [n.name for n in matmuls(source) if is_head(n) or n.input[1] not in constants]
    quantize_static(
        source,
        target,
        Calibration(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        nodes_to_exclude=skipped,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "DefaultTensorType": onnx.TensorProto.FLOAT,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )


def matmuls(path: Path) -> list[Any]:
    """Nodes that multiply matrices."""
    return [n for n in onnx.load(path).graph.node if n.op_type == "MatMul"]


def is_head(node: Any) -> bool:
    """Whether a node is the QA head."""
    return any(HEAD in name for name in (node.name, *node.input))


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Random requests, as every engine is calibrated with."""

    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Array]] = iter(batches())

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, or None after the last."""
        return next(self.batches, None)


if __name__ == "__main__":
    serve(load, onnxruntime.__version__)
