"""OpenVINO: fp32, bf16 and int8 by NNCF, compiled for the shape of a case: faster there than a model of any shape.

Where a case has several shapes, one model of any shape runs all but the first: every model has weights of its own.

Variants: "fp32", "bf16", "int8", "int8 + bf16" (bf16 where it is not int8), "int8 sparse" (int8 + bf16 with sparse
weights kept compressed, OpenVINO's own feature for zeros).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf  # type: ignore[import-not-found]
import numpy as np
import openvino

from .calibration import COUNT, batches
from .protocol import Array, Bind, Step, serve

SPARSE_FROM = 0.7
"""Share of zeros from which a layer's weights are kept compressed."""


class Loaded:
    """A model that is compiled where its shape is known."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        """For the first shape, and for any."""

    def load(self, folder: Path, variant: str, threads: int) -> Bind:
        """Read the model."""
        path = made(folder, variant)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Without the hint, fp32 silently runs as bf16 where the CPU has it.
            "INFERENCE_PRECISION_HINT": "f32" if variant in ("fp32", "int8") else "bf16",
            "ENABLE_CPU_PINNING": False,
        }
        if variant == "int8 sparse":
            settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = SPARSE_FROM
        core = openvino.Core()

        def bind(ids: Array, mask: Array) -> Step:
            inputs = {"input_ids": ids, "attention_mask": mask}
            if len(self.compiled) < 2:
                model = core.read_model(path)
                model.reshape({name: [-1, -1] if self.compiled else list(ids.shape) for name in inputs})
                self.compiled.append(core.compile_model(model, "CPU", settings))
            request = self.compiled[-1].create_infer_request()
            for name, value in inputs.items():
                request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(value)))

            def step() -> Array:
                request.infer()
                return request.get_output_tensor(0).data

            return step

        return bind

    def forget(self) -> None:
        """Drop the models of a case."""
        self.compiled.clear()


def made(folder: Path, variant: str) -> Path:
    """The file of a variant, written if it is not there."""
    if not variant.startswith("int8"):
        return folder / "fp32.onnx"
    path = folder / "openvino int8.xml"
    if not path.exists():
        model = nncf.quantize(
            openvino.Core().read_model(folder / "fp32.onnx"),
            nncf.Dataset(batches()),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=COUNT,
            ignored_scope=nncf.IgnoredScope(patterns=[".*logits.*"], validate=False),
            # Smoothing would multiply the weights, zeros stay zeros, but their scales would not be the other engines'.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
            ),
        )
        # The graph is read once its name is there: the weights come first.
        part = folder / "openvino int8 part.xml"
        openvino.save_model(model, part, compress_to_fp16=False)
        part.with_suffix(".bin").rename(path.with_suffix(".bin"))
        part.rename(path)
    return path


if __name__ == "__main__":
    loaded = Loaded()
    serve(loaded.load, f"{openvino.__version__.split('-')[0]}, nncf {nncf.__version__}", forget=loaded.forget)
