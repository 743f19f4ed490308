import json
import shutil
import subprocess
import sys
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from whet.frontend.families import FAMILIES
from whet.frontend.huggingface import from_folder, from_transformers
from whet.passes.interpret import interpret

FOLDERS = {
    "bert-embedding": "embedding",
    "bert-embedding-dense": "embedding",
    "bert-hidden-states": "hidden_states",
    "bert-sequence": "sequence_classification",
    "bert-token": "token_classification",
    "bert-question": "question_answering",
    "distilbert-hidden-states": "hidden_states",
    "distilbert-sequence": "sequence_classification",
    "distilbert-token": "token_classification",
    "distilbert-question": "question_answering",
}


def split(values, lengths):
    return np.split(values, np.cumsum(lengths)[:-1])


def run(model, folder):
    """The model's output on the stored batch, and what torch computed."""
    expected = np.load(folder / "expected.npz")
    ids, types = (split(expected[name], expected["lengths"]) for name in ("ids", "token_types"))
    return interpret(model.module, ids, types), expected["output"]


def check(model, folder, tolerance=1e-5):
    output, expected = run(model, folder)
    assert output.dtype == np.float32
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def copy(references, tmp_path):
    """``copy(name)`` is a writable copy of a reference folder."""

    def make(name):
        shutil.copytree(references / name, tmp_path / name)
        return tmp_path / name

    return make


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# What torch computes


@pytest.mark.parametrize("name", FOLDERS)
def test_matches_torch(name, references):
    model = from_folder(references / name)
    assert (model.name, model.task, model.dialect) == (name, FOLDERS[name], True)
    check(model, references / name)


def test_minilm_matches_torch(references, minilm_folder):
    model = from_folder(minilm_folder)
    expected = np.load(references / "minilm.npz")
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    tokenizer.enable_truncation(model.max_length)
    ids = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(list(map(str, expected["sentences"])))]
    assert [len(row) for row in ids] == expected["lengths"].tolist()
    np.testing.assert_array_equal(np.concatenate(ids), expected["ids"])
    np.testing.assert_allclose(interpret(model.module, ids), expected["output"], atol=1e-5)
    assert (model.task, model.max_length, model.vocab_size, model.notes) == ("embedding", 256, 30522, ())


# What a user has to know beside the graph


def test_facts_of_bert(references):
    model = from_folder(references / "bert-sequence")
    assert model.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert (model.vocab_size, model.max_length, model.type_vocab_size, model.pad_token_id) == (100, 40, 2, 0)
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert model.notes == ()
    assert [str(p.ty) for p in model.module["main"].params] == [
        'R.Tensor((tiles, 16), dtype="int32")',
        'R.Tensor((tiles, 16), dtype="int32")',
        'R.Tensor((tiles, 16), dtype="int32")',
        'R.Tensor((groups, 16, 2), dtype="int32")',
    ]


def test_facts_of_distilbert(references):
    model = from_folder(references / "distilbert-token")
    assert model.inputs == ("input_ids", "attention_mask")
    assert model.type_vocab_size == 1
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_labels_are_in_the_order_of_their_ids(copy):
    folder = copy("bert-sequence")
    edit_json(folder / "config.json", id2label={"2": "good", "0": "bad", "1": "so-so"})
    assert from_folder(folder).labels == ("bad", "so-so", "good")


def test_labels_default_to_two(copy):
    folder = copy("bert-sequence")
    edit_json(folder / "config.json", id2label=...)
    edit_weights(folder, lambda t: t.update({f"classifier.{n}": t[f"classifier.{n}"][:2] for n in ("weight", "bias")}))
    assert from_folder(folder).labels == ("LABEL_0", "LABEL_1")


def test_variables_are_named_after_what_they_are(references):
    names = []
    model = from_folder(references / "bert-embedding")
    interpret(model.module, [np.arange(3)], observe=lambda name, rows: names.append(name))
    layer = ["query", "key", "value", "context", "attention_output", "attention_sum", "attention_norm"]
    layer += ["intermediate", "output", "output_sum", "output_norm"]
    layers = [f"layer_{i}_{part}" for i in range(2) for part in layer]
    assert names == ["embeddings", *layers, "pooled", "normalized"]


def test_max_length(references, copy):
    assert from_folder(references / "bert-embedding").max_length == 24  # sentence_bert_config.json
    assert from_folder(references / "bert-embedding-dense").max_length == 24  # tokenizer_config.json
    assert from_folder(references / "bert-question").max_length == 40  # max_position_embeddings
    folder = copy("bert-embedding")
    edit_json(folder / "sentence_bert_config.json", max_seq_length=4000)
    assert from_folder(folder).max_length == 40


def test_pooling_makes_an_embedding_model(references):
    folder = references / "bert-hidden-states"
    expected = np.load(folder / "expected.npz")
    ids, types = (split(expected[name], expected["lengths"]) for name in ("ids", "token_types"))
    rows = split(expected["output"], expected["lengths"])
    for mode, reduce in {"mean": np.mean, "max": np.max, "cls": lambda x, axis: x[0]}.items():
        model = from_folder(folder, pooling=mode)
        assert model.task == "embedding"
        pooled = np.stack([reduce(row, axis=0) for row in rows])
        np.testing.assert_allclose(interpret(model.module, ids, types), pooled, atol=1e-5)


def test_pooling_is_refused_where_it_can_not_apply(references):
    with pytest.raises(ValueError, match="declares its own"):
        from_folder(references / "bert-embedding", pooling="cls")
    with pytest.raises(ValueError, match="has a head for token_classification"):
        from_folder(references / "bert-token", pooling="cls")
    with pytest.raises(ValueError, match="pooling is 'sum'; expected one of mean, cls, max"):
        from_folder(references / "bert-hidden-states", pooling="sum")


# Forms in which weights come


def test_sharded_weights(copy):
    folder = copy("bert-sequence")
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check(from_folder(folder), folder)

    for weight_map, message in (
        ({"a": "../model.safetensors"}, "is not a plain file name"),
        ({"a": "gone.safetensors"}, "names the shard gone.safetensors, which is not in"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            from_folder(folder)


def test_base_model_with_and_without_prefix_and_pooler(copy):
    folder = copy("bert-hidden-states")
    edit_weights(folder, lambda t: [t.pop("pooler.dense.weight"), t.pop("pooler.dense.bias")])
    check(from_folder(folder), folder)
    edit_weights(folder, lambda t: [t.update({f"bert.{name}": t.pop(name)}) for name in list(t)])
    model = from_folder(folder)
    check(model, folder)
    assert model.notes == ()


def test_names_of_tensorflow_days(copy):
    folder = copy("bert-sequence")

    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)

    edit_weights(folder, rename)
    check(from_folder(folder), folder)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-2), ("bfloat16", 3e-1), ("float64", 1e-5)])
def test_other_float_types_become_float32(copy, dtype, tolerance):
    folder = copy("bert-hidden-states")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    edit_weights(folder, lambda t: t.update({name: value.astype(kind) for name, value in t.items()}))
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {kind}
    check(from_folder(folder), folder, tolerance)


def test_language_model_head_is_left_out_with_a_note(copy):
    folder = copy("bert-hidden-states")

    def add_head(tensors):
        tensors["cls.predictions.bias"] = np.zeros(100, np.float32)
        tensors["embeddings.position_ids"] = np.arange(40)

    edit_weights(folder, add_head)
    edit_json(folder / "config.json", architectures=["BertForMaskedLM"])
    model = from_folder(folder)
    check(model, folder)
    assert model.notes[0] == "The language-model head of BertForMaskedLM is left out."
    assert model.notes[1] == f"Unused tensors in {folder / 'model.safetensors'}: cls.predictions.bias."


def test_architectures_may_be_missing_for_a_base_model_only(copy):
    folder = copy("bert-hidden-states")
    edit_json(folder / "config.json", architectures=None)
    assert from_folder(folder).task == "hidden_states"
    folder = copy("bert-token")
    edit_json(folder / "config.json", architectures=...)
    with pytest.raises(ValueError, match=r"names no architectures, but the weights hold classifier\.weight"):
        from_folder(folder)


class Tensor:
    """As much of a torch tensor as importing needs."""

    def __init__(self, array):
        self.array, self.dtype = array, self
        self.is_floating_point = array.dtype.kind == "f"

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


class InMemory:
    """As much of a transformers model as importing needs."""

    def __init__(self, folder):
        self.values = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        self.config = self

    def to_dict(self):
        labels = self.values.get("id2label", {})
        return {**self.values, "architectures": None, "id2label": {int(k): v for k, v in labels.items()} or None}

    def state_dict(self):
        return {name: Tensor(value) for name, value in self.tensors.items()}


@pytest.mark.parametrize("name", [name for name in FOLDERS if "embedding" not in name])
def test_models_in_memory(name, references):
    folder = references / name
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = from_transformers(type(class_name, (InMemory,), {})(folder), tokenizer)
    assert model.task == FOLDERS[name]
    assert (model.labels, model.tokenizer_json) == (from_folder(folder).labels, tokenizer.to_str())
    check(model, folder)


def test_what_is_no_model_or_tokenizer_in_memory(references):
    with pytest.raises(ValueError, match="dict is not a transformers model"):
        from_transformers({})
    model = type("BertModel", (InMemory,), {})(references / "bert-hidden-states")
    with pytest.raises(ValueError, match="str is not a fast tokenizer"):
        from_transformers(model, "tokenizer")
    assert "No tokenizer" in from_transformers(model).notes[0]


# Tokenizers


def test_tokenizer_loses_padding_and_truncation(copy):
    folder = copy("bert-sequence")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    imported = Tokenizer.from_str(from_folder(folder).tokenizer_json)
    assert imported.padding is imported.truncation is None
    assert len(imported.encode("the blade is sharpened to a stone").ids) > 4


def test_tokenizer_from_vocab_txt(copy):
    folder = copy("bert-sequence")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = sorted(original.get_vocab(), key=original.get_vocab().get)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder / "tokenizer.json").unlink()
    imported = Tokenizer.from_str(from_folder(folder).tokenizer_json)
    assert imported.get_vocab() == original.get_vocab()
    for pair in (("The blade,  is Shärpened!", None), ("a stone [MASK] 7", "whetted"), ("", None), ("東京 the", "")):
        ours, theirs = imported.encode(*pair), original.encode(*pair)
        assert (ours.ids, ours.type_ids) == (theirs.ids, theirs.type_ids)
    assert imported.decode(imported.encode("sharpened").ids) == "sharpened"

    edit_json(folder / "tokenizer_config.json", do_lower_case=False)
    cased = Tokenizer.from_str(from_folder(folder).tokenizer_json)
    assert cased.encode("The").tokens == ["[CLS]", "[UNK]", "[SEP]"]

    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"vocab.txt has no \[UNK\] token"):
        from_folder(folder)


def test_tokenizer_config_overrides_case(copy):
    folder = copy("bert-sequence")
    edit_json(folder / "tokenizer_config.json", do_lower_case=False)
    assert "[UNK]" in Tokenizer.from_str(from_folder(folder).tokenizer_json).encode("The").tokens


def test_sentence_transformers_may_lower_case(copy):
    folder = copy("bert-embedding")
    edit_json(folder / "tokenizer_config.json", do_lower_case=False)
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    assert Tokenizer.from_str(from_folder(folder).tokenizer_json).encode("The").tokens == ["[CLS]", "the", "[SEP]"]


def test_no_tokenizer_is_a_note(copy):
    folder = copy("bert-sequence")
    (folder / "tokenizer.json").unlink()
    model = from_folder(folder)
    assert model.tokenizer_json is None
    assert "No tokenizer was found" in model.notes[0]


def test_tokenizer_larger_than_the_model_is_a_note(copy):
    folder = copy("bert-sequence")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"new{i}" for i in range(20)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "the model 100" in from_folder(folder).notes[0]


@pytest.mark.parametrize("content", ["{", '{"model": 3}', b"\xff\xfe"])
def test_corrupt_tokenizer(copy, content):
    folder = copy("bert-sequence")
    (folder / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"tokenizer\.json is not"):
        from_folder(folder)


# Sentence-transformers declarations


def test_encoder_in_a_folder_of_its_own(copy):
    folder = copy("bert-embedding")
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    model = from_folder(folder)
    assert (model.name, model.max_length) == ("bert-embedding", 24)
    check(model, folder)


def test_modules_without_pooling_leave_the_head_to_the_architecture(copy):
    folder = copy("bert-sequence")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    (folder / "modules.json").write_text(json.dumps([module]))
    assert from_folder(folder).task == "sequence_classification"


def test_default_prompt_is_a_note(copy):
    folder = copy("bert-embedding")
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "query: "}, default_prompt_name="query")
    assert "'query: '" in from_folder(folder).notes[0]


def change_module(folder, index, **changes):
    modules = json.loads((folder / "modules.json").read_text())
    modules[index].update(changes)
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_module(f, 0, type="a.CLIPModel"), "the first module is 'a.CLIPModel'"),
        (lambda f: change_module(f, 2, type="a.WeightedLayerPooling"), "'a.WeightedLayerPooling' is not supported"),
        (lambda f: change_module(f, 1, type="a.Normalize"), "is not a Pooling"),
        (lambda f: change_module(f, 1, path="../1_Pooling"), "leaves the folder"),
        (lambda f: (f / "modules.json").write_text("{}"), "not a list of modules"),
        (lambda f: (f / "1_Pooling/config.json").write_text('{"pooling_mode": "lasttoken"}'), "is 'lasttoken'"),
        (
            lambda f: edit_json(f / "1_Pooling/config.json", pooling_mode_max_tokens=True),
            r"pooling_mode is \['max', 'mean'\]",
        ),
        (
            lambda f: edit_json(f / "1_Pooling/config.json", word_embedding_dimension=64),
            "the pooling takes 64 channels; the encoder has 32",
        ),
        (lambda f: edit_json(f / "sentence_bert_config.json", max_seq_length=-1), "max_seq_length is -1"),
    ],
)
def test_unsupported_declarations(copy, change, message):
    folder = copy("bert-embedding")
    change(folder)
    with pytest.raises(ValueError, match=message):
        from_folder(folder)


def test_dense_module(copy):
    folder = copy("bert-embedding-dense")
    config = folder / "2_Dense/config.json"
    edit_json(config, activation_function="torch.nn.modules.activation.SELU")
    with pytest.raises(ValueError, match=r"activation_function is 'torch\.nn\.modules\.activation\.SELU'; supported"):
        from_folder(folder)
    edit_json(config, activation_function="torch.nn.modules.linear.Identity", bias=False)
    assert from_folder(folder).task == "embedding"
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense has only pickled weights"):
        from_folder(folder)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "xlnet"}, "model_type is 'xlnet'; supported: bert, distilbert"),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; supported: gelu, gelu_new, gelu_pytorch_tanh, relu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True; only encoders"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is"),
        (
            {"architectures": ["BertForMultipleChoice"]},
            "architectures is 'BertForMultipleChoice'; supported: BertModel",
        ),
        ({"architectures": ["RobertaModel"]}, "architectures is 'RobertaModel'"),
        ({"hidden_size": ...}, "hidden_size is None; expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_attention_heads": 5}, "32 hidden channels can't be divided among 5 heads"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0; expected a positive number"),
        ({"num_hidden_layers": 3}, "no tensor 'bert.encoder.layer.2.attention.self.query.weight'"),
        ({"vocab_size": 99}, r"word_embeddings.weight has shape \(100, 32\); the configuration says \(99, 32\)"),
        ({"id2label": {"0": "a"}}, r"classifier.weight has shape \(3, 32\); the configuration says \(1, 32\)"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "id2label is"),
        ({"id2label": ["a"]}, "id2label is"),
    ],
)
def test_unsupported_configurations(copy, changes, message):
    folder = copy("bert-sequence")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        from_folder(folder)


def spoil(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.bias"), "no tensor 'classifier.bias'"),
        (lambda t: t.pop("bert.embeddings.LayerNorm.bias"), "no tensor 'bert.embeddings.LayerNorm.bias'"),
        (spoil("bert.pooler.dense.weight", np.nan), "pooler.dense.weight holds NaN or infinity in 1 of 1024 places"),
        (spoil("bert.encoder.layer.1.output.dense.bias", -np.inf), "output.dense.bias holds NaN or infinity"),
        (
            lambda t: t.update({"classifier.weight": np.zeros((3, 32), np.int8)}),
            "classifier.weight is int8; expected a floating-point tensor",
        ),
    ],
)
def test_bad_weights_are_named(copy, change, message):
    folder = copy("bert-sequence")
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        from_folder(folder)


def test_missing_and_corrupt_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        from_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_folder(tmp_path / "empty")

    folder = copy("bert-sequence")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not safetensors at all", content[:4]):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            from_folder(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        from_folder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        from_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        from_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        from_folder(folder)


def test_torch_is_not_needed():
    """Where torch is installed, TVM imports it by itself; so here it can't be imported."""
    hide = "import sys; sys.modules.update(torch=None, transformers=None)"
    subprocess.run([sys.executable, "-c", f"{hide}; import whet.frontend.huggingface"], check=True)


def test_every_family_has_references():
    families = Counter(name.partition("-")[0] for name in FOLDERS)
    assert set(FAMILIES) == set(families)
    assert min(families.values()) >= 4


@pytest.mark.parametrize(("folder", "several"), [("bert-sequence", False), ("distilbert-sequence", True)])
def test_labels_exclude_one_another_unless_there_is_one_or_the_config_says_so(references, folder, several):
    assert from_folder(references / folder).multi_label == several


def test_problem_type_makes_labels_independent(references, tmp_path):
    shutil.copytree(references / "bert-sequence", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    assert from_folder(tmp_path / "m").multi_label
