"""The same model in the engines that people use today, for ``whet bench --against``.

Every peer runs the weights of the source model: the ONNX file itself, or one written by :mod:`whet.onnx_export`. Each
is set up as its own documentation advises for latency on a CPU, with as many threads as Whet gets.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Inputs: TypeAlias = Mapping[str, NDArray[np.int64]]
Run: TypeAlias = Callable[[Inputs], NDArray[Any]]
"""From ``input_ids``, ``attention_mask`` and ``token_type_ids`` ``(batch, sequence)`` to the model's output."""


@dataclass(frozen=True)
class Peer:
    """One engine with one file."""

    name: str
    version: str
    open: Callable[[int], Run]
    """From a number of threads to a function that runs the model; called on the thread that will run it."""


@dataclass(frozen=True)
class Missing:
    """A peer that was asked for and can't run, and why."""

    name: str
    reason: str


def make_peers(engines: Sequence[str], source: str | Path, folder: Path) -> list[Peer | Missing]:
    """Prepare ``engines`` (of ``PEERS``) for the model ``source``; files are made in ``folder``.

    Raises:
        ValueError: an unknown engine, or the source can't be imported or written as ONNX.
        FileNotFoundError: no such source.

    """
    for engine in engines:
        if engine not in PEERS:
            raise ValueError(f"engine is {engine!r}; expected one of {', '.join(PEERS)}")
    installed = [e for e in engines if importlib.util.find_spec(e) is not None]
    file = onnx_file(Path(source), folder) if installed else None
    peers: list[Peer | Missing] = []
    for engine in engines:
        if file is None or engine not in installed:
            peers.append(Missing(engine, f"not installed; pip install {engine}"))
        else:
            peers += PEERS[engine](file, folder)
    return peers


@dataclass(frozen=True)
class OnnxFile:
    """A model as an ONNX file."""

    path: Path
    quantised: bool
    """Whether it computes in integers already."""


def onnx_file(source: Path, folder: Path) -> OnnxFile:
    """Take an ``.onnx`` file as it is; export any other source to ``folder``."""
    import onnx  # noqa: PLC0415 -- bench without peers needs none of this

    if source.suffix == ".onnx":
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist; expected an ONNX file")
        graph = onnx.load(source, load_external_data=False).graph
        return OnnxFile(source, any(_is_integer(node.op_type) for node in graph.node))
    from whet.compiler import import_model  # noqa: PLC0415
    from whet.onnx_export import export_onnx  # noqa: PLC0415

    path = folder / "fp32.onnx"
    export_onnx(import_model(source), path)
    return OnnxFile(path, quantised=False)


def _is_integer(op: str) -> bool:
    return "Quantize" in op or op.startswith(("QLinear", "QAttention", "QGemm")) or "Integer" in op


def _onnxruntime(file: OnnxFile, folder: Path) -> list[Peer | Missing]:
    release = version("onnxruntime")
    if file.quantised:
        return [Peer("onnxruntime int8", release, partial(_open_onnxruntime, file.path))]
    fp32 = Peer("onnxruntime fp32", release, partial(_open_onnxruntime, file.path))
    int8 = folder / "int8.onnx"
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

        with _no_advice():
            quantize_dynamic(file.path, int8, weight_type=QuantType.QInt8)
    except Exception as error:
        return [fp32, Missing("onnxruntime int8", f"quantize_dynamic failed: {_line(error)}")]
    return [fp32, Peer("onnxruntime int8", release, partial(_open_onnxruntime, int8))]


def _open_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Inputs) -> NDArray[Any]:
        return _output(session.run(None, _chosen(names, inputs)))

    return run


def _openvino(file: OnnxFile, folder: Path) -> list[Peer | Missing]:
    release = version("openvino")
    precision = "int8" if file.quantised else "fp32"
    peers: list[Peer | Missing] = [Peer(f"openvino {precision}", release, partial(_OpenVino, file.path))]
    if file.quantised:
        return peers
    if importlib.util.find_spec("nncf") is None:
        return [*peers, Missing("openvino int8", "nncf, which quantises for it, is not installed; pip install nncf")]
    path = folder / "int8.xml"
    try:
        with _no_advice():
            _quantise_openvino(file.path, path)
    except Exception as error:
        return [*peers, Missing("openvino int8", f"nncf.quantize failed: {_line(error)}")]
    return [*peers, Peer("openvino int8", release, partial(_OpenVino, path))]


class _OpenVino:
    """Compiles the model for each shape it meets: faster there than a dynamic shape."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.threads = threads
        self.requests: dict[tuple[int, ...], tuple[Any, list[str]]] = {}

    def __call__(self, inputs: Inputs) -> NDArray[Any]:
        request, names = self._request(next(iter(inputs.values())).shape)
        outputs = request.infer(_chosen(names, inputs), share_inputs=True)
        return _output([outputs[i] for i in range(len(outputs))])

    def _request(self, shape: tuple[int, ...]) -> tuple[Any, list[str]]:
        if shape not in self.requests:
            import openvino  # noqa: PLC0415

            core = openvino.Core()
            model = core.read_model(self.path)
            names = [i.any_name for i in model.inputs]
            model.reshape({name: list(shape) for name in names})
            # Without the precision hint, fp32 silently runs as bf16 where the CPU has it.
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads,
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False,
            }
            self.requests[shape] = core.compile_model(model, "CPU", settings).create_infer_request(), names
        return self.requests[shape]


def _quantise_openvino(source: Path, target: Path) -> None:
    """Post-training quantisation by NNCF, calibrated on random tokens: good for timing, not for accuracy."""
    import openvino  # noqa: PLC0415

    nncf: Any = importlib.import_module("nncf")  # has no types
    model = openvino.Core().read_model(source)
    names = [i.any_name for i in model.inputs]
    random = np.random.default_rng(0)
    shape = (1, 64)
    samples = [
        _chosen(
            names,
            {
                "input_ids": random.integers(1, 1000, shape),
                "attention_mask": np.ones(shape, np.int64),
                "token_type_ids": np.zeros(shape, np.int64),
            },
        )
        for _ in range(16)
    ]
    quantised = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
    openvino.save_model(quantised, target, compress_to_fp16=False)


def _chosen(names: Sequence[str], inputs: Inputs) -> dict[str, NDArray[np.int64]]:
    """Pick the inputs that the model declares.

    Raises:
        ValueError: it declares one that no encoder batch has.

    """
    unknown = [name for name in names if name not in inputs]
    if unknown:
        raise ValueError(f"the model has the input {unknown[0]!r}; expected some of {', '.join(inputs)}")
    return {name: inputs[name] for name in names}


def _output(outputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Take the first output; start and end logits, where a file has them apart, are put together."""
    pair = len(outputs) == 2 and outputs[0].ndim == 2 and outputs[0].shape == outputs[1].shape
    return np.stack(list(outputs), axis=-1) if pair else outputs[0]


@contextmanager
def _no_advice() -> Iterator[None]:
    """Keep the peers' warnings out of the user's terminal, and their progress out of what is piped."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


PEERS: dict[str, Callable[[OnnxFile, Path], list[Peer | Missing]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
