import importlib.util

import numpy as np
import pytest

from whet.frontend.huggingface import from_folder
from whet.onnx_export import export_onnx
from whet.passes.interpret import interpret
from whet.peers import PEERS, Missing, Peer, _chosen, _output, make_peers, onnx_file

pytest.importorskip("onnx", reason="onnx is not installed: it comes with Whet's extra compile")


@pytest.fixture
def model(references):
    return from_folder(references / "bert-question")


@pytest.fixture
def file(model, tmp_path):
    export_onnx(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def batch(ids):
    ids = np.asarray(ids)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("engine", PEERS)
def test_peers_compute_the_model(engine, model, file, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (2, 9))
    expected = interpret(model.module, list(ids)).reshape(2, 9, 2)
    peers = {p.name: p for p in make_peers([engine], file, tmp_path) if isinstance(p, Peer)}
    np.testing.assert_allclose(peers[f"{engine} fp32"].open(1)(batch(ids)), expected, atol=1e-4)
    for peer in peers.values():
        actual = peer.open(1)(batch(ids))
        assert actual.shape == expected.shape
        assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.95


def test_an_integer_file_runs_as_it_is(file, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    quantization.quantize_dynamic(file, tmp_path / "q.onnx")
    assert not onnx_file(file, tmp_path).quantised
    assert onnx_file(tmp_path / "q.onnx", tmp_path).quantised
    assert [p.name for p in make_peers(["onnxruntime"], tmp_path / "q.onnx", tmp_path)] == ["onnxruntime int8"]


def test_what_is_not_installed_is_reported(file, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert make_peers(["openvino"], file, tmp_path) == [Missing("openvino", "not installed; pip install openvino")]


def test_unknown_engines_and_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="engine is 'tensorrt'; expected one of onnxruntime, openvino"):
        make_peers(["tensorrt"], tmp_path / "m.onnx", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.onnx does not exist"):
        onnx_file(tmp_path / "none.onnx", tmp_path)


def test_inputs_are_picked_by_name_and_start_and_end_are_put_together():
    inputs = batch([[1, 2]])
    assert list(_chosen(["attention_mask", "input_ids"], inputs)) == ["attention_mask", "input_ids"]
    with pytest.raises(ValueError, match="the model has the input 'pixel_values'"):
        _chosen(["pixel_values"], inputs)
    start, end = np.zeros((2, 3)), np.ones((2, 3))
    assert _output([start, end]).shape == (2, 3, 2)
    assert _output([np.zeros((2, 3, 4)), end]).shape == (2, 3, 4)
