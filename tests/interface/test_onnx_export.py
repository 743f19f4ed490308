import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest

from whet.frontend.huggingface import from_folder
from whet.frontend.onnx import from_onnx
from whet.onnx_export import export_onnx
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.interpret import interpret

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nothing to run the exported graph with")

LENGTHS = (5, 16, 1, 23)

FOLDERS = (
    "bert-embedding",
    "bert-embedding-dense",
    "bert-hidden-states",
    "bert-question",
    "bert-sequence",
    "bert-token",
    "distilbert-hidden-states",
    "distilbert-question",
    "distilbert-sequence",
    "distilbert-token",
)


def run_padded(path, model, ids, types):
    """The padded batch through ONNX Runtime; rows as the interpreter gives them."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    shape = (len(ids), max(map(len, ids)))
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    batch["input_ids"] += model.pad_token_id
    for row, (i, t) in enumerate(zip(ids, types, strict=True)):
        batch["input_ids"][row, : len(i)] = i
        batch["token_type_ids"][row, : len(i)] = t
        batch["attention_mask"][row, : len(i)] = 1
    assert tuple(i.name for i in session.get_inputs()) == model.inputs
    (output,) = session.run(None, {name: batch[name] for name in model.inputs})
    return output[batch["attention_mask"].astype(bool)] if output.ndim == 3 else output


@pytest.mark.parametrize("folder", FOLDERS)
def test_onnxruntime_computes_what_the_interpreter_does(folder, references, tmp_path):
    model = from_folder(references / folder)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, model.vocab_size, n) for n in LENGTHS]
    types = [rng.integers(0, model.type_vocab_size, n) for n in LENGTHS]
    export_onnx(model, tmp_path / "m.onnx")
    expected = interpret(model.module, ids, types)
    np.testing.assert_allclose(run_padded(tmp_path / "m.onnx", model, ids, types), expected, atol=1e-4, rtol=1e-4)


def test_fused_graphs_export_too(references, tmp_path):
    model = from_folder(references / "bert-embedding")
    module = fuse_residuals(fuse_activations(fuse_qkv(model.module)))
    ids = [np.arange(3, 3 + n) for n in LENGTHS]
    types = [np.zeros(n, int) for n in LENGTHS]
    fused = dataclasses.replace(model, module=module)
    export_onnx(fused, tmp_path / "m.onnx")
    actual = run_padded(tmp_path / "m.onnx", fused, ids, types)
    np.testing.assert_allclose(actual, interpret(model.module, ids, types), atol=1e-4)


def test_integer_weights_become_the_floats_they_stand_for(references, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization", reason="this onnxruntime can't quantise")
    export_onnx(from_folder(references / "bert-question"), tmp_path / "m.onnx")
    quantization.quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx")
    model = from_onnx(tmp_path / "q.onnx")
    assert "whet.quantized_weight" in model.module.script()
    export_onnx(model, tmp_path / "back.onnx")
    ids = [np.arange(3, 3 + n) for n in LENGTHS]
    types = [np.zeros(n, int) for n in LENGTHS]
    expected = interpret(model.module, ids, types)
    np.testing.assert_allclose(run_padded(tmp_path / "back.onnx", model, ids, types), expected, atol=1e-4)


@pytest.mark.parametrize(("folder", "gelu"), [("bert-embedding", "BiasGelu"), ("bert-hidden-states", "FastGelu")])
def test_onnxruntime_fuses_what_it_fuses_in_torch_exports(folder, gelu, references, tmp_path):
    """Else the comparison would be with a crippled peer."""
    model = from_folder(references / folder)
    export_onnx(model, tmp_path / "m.onnx")
    quantization = pytest.importorskip("onnxruntime.quantization", reason="this onnxruntime can't quantise")
    quantization.quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx")
    fp32, int8 = (optimised_ops(tmp_path / name) for name in ("m.onnx", "q.onnx"))
    layers = 2
    assert fp32[gelu] == layers and fp32["Erf"] == fp32["Tanh"] == 0
    assert fp32["FusedMatMul"] == layers, "the scale of the scores belongs to the product"
    assert int8["DynamicQuantizeMatMul"] + int8["MatMulIntegerToFloat"] == 6 * layers
    assert int8["SkipLayerNormalization"] > 0 and int8["MatMulInteger"] == 0


def optimised_ops(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_a_graph_that_was_not_recognised_is_refused(references, tmp_path):
    model = dataclasses.replace(from_folder(references / "bert-token"), dialect=False)
    with pytest.raises(ValueError, match="not recognised"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
