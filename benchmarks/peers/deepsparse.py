"""DeepSparse 1.8.0, the last with wheels: int8 in the form that SparseML's exporter writes, one engine per shape."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx

from .int8_graph import quantised
from .protocol import Array, Bind, Step, serve

os.environ["NM_DISABLE_ANALYTICS"] = "True"
import deepsparse  # type: ignore[import-not-found]  # reads the environment when it is imported


def load(folder: Path, variant: str, threads: int) -> Bind:
    """Make the graph; it is compiled where its shape is known."""
    if variant != "int8":
        raise ValueError(f"variant is {variant!r}")
    path = folder / "deepsparse int8.onnx"
    if not path.exists():
        part = path.with_suffix(".part")
        onnx.save(quantised(folder / "fp32.onnx"), part)
        part.rename(path)

    def bind(ids: Array, mask: Array) -> Step:
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copy(path, Path(scratch) / "model.onnx")  # the engine rewrites the file that it is given
            engine = deepsparse.Engine(
                str(copy), batch_size=len(ids), num_cores=threads, input_shapes=[list(ids.shape)] * 2
            )
        inputs = [np.ascontiguousarray(ids), np.ascontiguousarray(mask)]
        return lambda: engine.run(inputs, val_inp=False)[0]

    return bind


if __name__ == "__main__":
    serve(load, deepsparse.__version__)
