"""TVM as it is: the ONNX file through Relax's default pipeline for this CPU, fp32, not tuned."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from .protocol import Array, Bind, Step, serve


def load(folder: Path, variant: str, threads: int) -> Bind:
    """Read the model; it is compiled where its shape is known."""
    if variant != "fp32":
        raise ValueError(f"variant is {variant!r}")
    os.environ["TVM_NUM_THREADS"] = str(threads)
    source = onnx.load(folder / "fp32.onnx")
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})

    def bind(ids: Array, mask: Array) -> Step:
        shapes = {name: list(ids.shape) for name in ("input_ids", "attention_mask")}
        module = from_onnx(source, shape_dict=shapes, dtype_dict=dict.fromkeys(shapes, "int64"))
        machine = relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())
        inputs = [tvm.runtime.tensor(value) for value in (ids, mask)]
        return lambda: machine["main"](*inputs).numpy()

    return bind


if __name__ == "__main__":
    serve(load, tvm.__version__)
