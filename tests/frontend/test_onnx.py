from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from whet.frontend.model import Model
from whet.frontend.onnx import from_onnx
from whet.passes import dialect
from whet.passes.graph import Graph, attributes, is_call
from whet.passes.interpret import interpret
from whet.runtime.cpu import cpu_flags

FP32 = [
    ("embedding-ts17", "embedding", 3),
    ("sequence-ts11", "sequence_classification", 3),
    ("token-ts14", "token_classification", 2),
    ("question-dynamo18", "question_answering", 2),
    ("hidden-dynamo20", "hidden_states", 3),
    ("hidden-static17", "hidden_states", 3),
    ("roberta-ts17", "hidden_states", 2),
    ("embedding-attention", "embedding", 3),
]
QUANTISED = [
    ("token-dynamic-u8", 0.999),
    ("embedding-session-dynamic-channel", 0.999),
    ("embedding-qdq-channel", 0.97),
    ("token-qdq-tensor", 0.97),
    ("embedding-qlinear", 0.9),
]
SATURATED = 0.98
"""Without VNNI, ONNX Runtime's sums of u8 × s8 products saturate at 16 bits."""
LENGTHS = (1, 7, 9, 4)


@pytest.fixture(scope="module")
def files(references: Path) -> Path:
    return references / "onnx"


def run_both(path: Path, model: Model, output: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The imported graph on requests of mixed lengths, and ONNX Runtime on the padded batch: rows of each."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = rng.integers(5, model.vocab_size, mask.shape) * mask
    types = rng.integers(0, model.type_vocab_size, mask.shape) * mask
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    rows = session.get_inputs()[0].shape[0]
    step = rows if isinstance(rows, int) else len(LENGTHS)
    batches = [session.run(None, {n: a[i : i + step] for n, a in feeds.items()}) for i in range(0, len(ids), step)]
    results = dict(zip(names, (np.concatenate(parts) for parts in zip(*batches, strict=True)), strict=True))
    if output is None and "start_logits" in results:
        wanted = np.stack([results["start_logits"], results["end_logits"]], axis=-1)
    else:
        wanted = results[output or ("sentence_embedding" if "sentence_embedding" in names else names[0])]
    requests = [row[:n] for row, n in zip(ids, LENGTHS, strict=True)]
    request_types = [row[:n] for row, n in zip(types, LENGTHS, strict=True)]
    got = interpret(model.module, requests, request_types)
    return got, (wanted[mask == 1] if wanted.ndim == 3 else wanted)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize(("name", "task", "inputs"), FP32)
def test_fp32_files_give_what_onnx_runtime_gives(files: Path, name: str, task: str, inputs: int) -> None:
    model = from_onnx(files / f"{name}.onnx")
    assert (model.dialect, model.task, len(model.inputs)) == (True, task, inputs), model.notes
    assert model.vocab_size == 100
    assert model.max_length == (38 if name.startswith("roberta") else 40)
    got, want = run_both(files / f"{name}.onnx", model)
    assert np.abs(got - want).max() < 1e-4


def test_approximated_gelu_and_multi_head_attention(files: Path) -> None:
    path = files / "embedding-multi-head.onnx"
    model = from_onnx(path)
    calls = [b.value for b in Graph(model.module).bindings if is_call(b.value, dialect.DENSE)]
    assert "gelu_tanh" in {attributes(call)["activation"] for call in calls}
    got, want = run_both(path, model)
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize(("name", "least"), QUANTISED)
def test_quantised_files_are_near_onnx_runtime(files: Path, name: str, least: float) -> None:
    """How near depends on the rounding of activations there: none is done here."""
    model = from_onnx(files / f"{name}.onnx")
    assert model.dialect, model.notes
    got, want = run_both(files / f"{name}.onnx", model)
    exact = {"avx512_vnni", "avx_vnni"} & cpu_flags()
    assert cosine(got, want) > (least if exact else min(least, SATURATED))
    assert any("activations are calibrated anew" in note for note in model.notes)


@pytest.mark.parametrize("name", ["embedding-qdq-channel", "token-qdq-tensor", "embedding-qlinear"])
def test_static_quantisation_means_its_real_arithmetic(files: Path, name: str) -> None:
    """The exact meaning: the same weights, dequantised, in the float file that was quantised."""
    source = files / ("token-ts14.onnx" if name.startswith("token") else "embedding-ts17.onnx")
    got, _ = run_both(files / f"{name}.onnx", from_onnx(files / f"{name}.onnx"))
    want, _ = run_both(source, from_onnx(source))
    assert cosine(got, want) > 0.999


WEIGHTS = {
    "MatMulInteger": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
    "QLinearMatMul": (3, 5),
    "DequantizeLinear": (0, 2),
}
"""Places of the weight and its zero point among the inputs."""


@pytest.mark.parametrize("name", ["embedding-session-dynamic-channel", "embedding-qdq-channel", "embedding-qlinear"])
def test_integer_weights_stay_exactly(files: Path, name: str) -> None:
    path = files / f"{name}.onnx"
    graph = Graph(from_onnx(path).module)
    calls = [b.value for b in graph.bindings if is_call(b.value, dialect.QUANTIZED_WEIGHT)]
    kept = {graph.constant(call.args[0]).tobytes() for call in calls}
    source = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
    checked = 0
    for node in (node for node in source.graph.node if node.op_type in WEIGHTS):
        weight, zero = (arrays.get(node.input[place]) for place in WEIGHTS[node.op_type])
        if weight is not None and zero is not None and weight.ndim == 2 and len(weight) in (32, 64):
            integers = (weight.astype(np.int32) - zero.astype(np.int32)).T
            assert np.ascontiguousarray(integers, np.int8).tobytes() in kept, node.name
            checked += 1
    assert checked == 12


def test_weights_that_do_not_fit_are_dequantised_with_a_note(files: Path) -> None:
    model = from_onnx(files / "token-dynamic-u8.onnx")
    assert any("more than int8: its dequantised values are used" in note for note in model.notes)
    calls = [b.value for b in Graph(model.module).bindings if is_call(b.value, dialect.QUANTIZED_WEIGHT)]
    assert len(calls) == 2, "the embedding tables: shifted into int8, as layer norm subtracts the shift"


def test_scales_stay_exactly(files: Path) -> None:
    path = files / "embedding-qdq-channel.onnx"
    graph = Graph(from_onnx(path).module)
    scales = {
        graph.constant(b.value.args[1]).tobytes() for b in graph.bindings if is_call(b.value, dialect.QUANTIZED_WEIGHT)
    }
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    per_channel = [a for n, a in arrays.items() if n.endswith("_scale") and a.ndim == 1 and a.size in (32, 64)]
    assert len(per_channel) == 12
    assert all(a.tobytes() in scales for a in per_channel)


def test_variables_are_named_by_role(files: Path) -> None:
    names = [b.var.name for b in Graph(from_onnx(files / "embedding-ts17.onnx").module).bindings]
    assert {"embeddings", "layer_0_query", "layer_1_context", "layer_1_output_norm", "pooled", "normalized"} <= set(
        names
    )


def test_output_task_and_pooling_can_be_chosen(files: Path) -> None:
    path = files / "hidden-dynamo20.onnx"
    pooler = from_onnx(path, output="pooler_output")
    assert pooler.task == "embedding"
    got, want = run_both(path, pooler, "pooler_output")
    assert np.abs(got - want).max() < 1e-4
    hidden = from_onnx(path)
    assert any("left out: pooler_output" in note for note in hidden.notes)
    mean = from_onnx(path, pooling="mean")
    assert mean.task == "embedding"
    ids = [np.array([5, 6, 7]), np.array([8])]
    rows = interpret(hidden.module, ids)
    np.testing.assert_allclose(interpret(mean.module, ids), [rows[:3].mean(axis=0), rows[3]], atol=1e-6)
    with pytest.raises(ValueError, match=r"pooling is 'mean', but the output of .* is not hidden states"):
        from_onnx(files / "embedding-ts17.onnx", pooling="mean")
    with pytest.raises(ValueError, match="output is 'nothing'; expected one of last_hidden_state, pooler_output"):
        from_onnx(path, output="nothing")
    with pytest.raises(ValueError, match="is per token; name another output, or give pooling"):
        from_onnx(path, task="embedding", output="last_hidden_state")


def test_folder_gives_tokenizer_labels_and_head(files: Path, references: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export" / "onnx"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes((files / "token-ts14.onnx").read_bytes())
    (folder.parent / "config.json").write_text('{"id2label": {"0": "O", "1": "PER", "2": "LOC", "3": "ORG"}}')
    tokenizer = (references / "bert-embedding" / "tokenizer.json").read_text()
    (folder.parent / "tokenizer.json").write_text(tokenizer)
    model = from_onnx(folder / "model.onnx")
    assert model.labels == ("O", "PER", "LOC", "ORG")
    assert model.tokenizer_json is not None
    declared = from_onnx(files / "hidden-dynamo20.onnx", tokenizer=references / "bert-embedding")
    assert (declared.task, declared.max_length) == ("embedding", 24)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        from_onnx(files / "token-ts14.onnx", tokenizer=tmp_path / "nowhere")


def test_what_is_no_encoder_runs_as_plain_relax(files: Path) -> None:
    path = files / "mpnet-ts17.onnx"
    model = from_onnx(path)
    assert not model.dialect
    assert any("relative_attention_bias" in note for note in model.notes)
    machine = relax.VirtualMachine(relax.build(model.module, target="llvm"), tvm.cpu())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length in ((2, 9), (1, 17)):
        rng = np.random.default_rng(length)
        ids = rng.integers(5, 100, (batch, length))
        mask = np.ones_like(ids)
        mask[0, length // 2 :] = 0
        want = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        got = machine["main"](tvm.runtime.tensor(ids), tvm.runtime.tensor(mask)).numpy()
        assert np.abs(got - want).max() < 1e-4


def one_node(op: str, tmp_path: Path, inputs: tuple[str, ...] = ("input_ids",), domain: str = "") -> Path:
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in inputs]
    node = helper.make_node(op, list(inputs), ["y"], name="the-node", domain=domain)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    path = tmp_path / "one.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]), path
    )
    return path


def test_errors_name_what_is_wrong(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.onnx does not exist"):
        from_onnx(tmp_path / "missing.onnx")
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes((files / "token-ts14.onnx").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"corrupt\.onnx is not an ONNX file, or is cut off"):
        from_onnx(corrupt)
    with pytest.raises(ValueError, match=r"has no input of token ids .* its inputs are: pixels, mask"):
        from_onnx(one_node("Add", tmp_path, ("pixels", "mask")))
    with pytest.raises(ValueError, match=r"node 'the-node' \(own\.Mystery\) can't be compiled: this operator is not"):
        from_onnx(one_node("Mystery", tmp_path, domain="own"))
    with pytest.raises(ValueError, match="task is 'poetry'; expected one of embedding"):
        from_onnx(files / "token-ts14.onnx", task="poetry")  # type: ignore[arg-type]


def test_real_int8_tagger(tagger_file: Path) -> None:
    model = from_onnx(tagger_file)
    assert (model.dialect, model.task, model.vocab_size, model.max_length) == (True, "token_classification", 28996, 512)
    assert model.tokenizer_json is not None
    got, want = run_both(tagger_file, model)
    assert cosine(got, want) > 0.999
