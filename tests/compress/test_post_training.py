import json

import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from tiny_encoders import load, make_model, make_sentence_encoder, sentences  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordPiece  # noqa: E402
from tokenizers.normalizers import BertNormalizer  # noqa: E402

from whet.compress.blocks import Block  # noqa: E402
from whet.compress.features import in_order, make_features  # noqa: E402
from whet.compress.losses import run  # noqa: E402
from whet.compress.masks import keep_best  # noqa: E402
from whet.compress.post_training import prune_post_training  # noqa: E402
from whet.frontend.huggingface import from_folder  # noqa: E402

TEXTS = [text for text, _ in sentences(200)]


def states_of(encoder, batches):
    with torch.no_grad():
        return torch.cat([run(encoder, b).states[-1][b["attention_mask"].bool()] for b in batches])


@pytest.mark.parametrize(
    ("task", "head"), [("embedding", "Model"), ("sequence_classification", "ForSequenceClassification")]
)
def test_how_an_earlier_model_was_made_is_not_taken_along(task, head, tmp_path):
    folder = make_model(tmp_path / "m", head=head, labels=("a", "b"))
    for name in ("recipe.toml", "training.jsonl", "measured.json", "notes.txt"):
        (folder / name).write_text("{}")
    load(folder, task).save(tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "notes.txt"} <= kept
    assert not kept & {"recipe.toml", "training.jsonl", "measured.json"}


@pytest.mark.parametrize(("tokenizer", "before"), [(True, False), (False, False), (False, True)])
def test_texts_are_trained_on_as_the_compiler_reads_them(tokenizer, before, tmp_path):
    folder = make_model(tmp_path / "m")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Bread", "bread"]
    made = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = BertNormalizer(lowercase=tokenizer)
    for settings in folder.glob("*token*"):
        settings.unlink()
    made.save(str(folder / "tokenizer.json"))
    (folder / "modules.json").write_text('[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]')
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": before}))
    compiled = Tokenizer.from_str(from_folder(folder).tokenizer_json).encode("Bread", add_special_tokens=False).ids
    trained = load(folder).tokenizer.encode("Bread", add_special_tokens=False).ids
    assert trained == compiled == [6 if tokenizer or before else 5]


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_states_stay_closer_than_with_magnitude(family, tmp_path):
    folder = make_model(tmp_path / "m", family=family)
    teacher, ours, cut = (load(folder) for _ in range(3))
    batches = [batch for _, batch in in_order(make_features(teacher, TEXTS, 64), 50, teacher)]
    told = []
    errors = prune_post_training(ours, teacher, batches, Block(4), dict.fromkeys(ours.dense, 0.5), 0.01, told.append)
    assert list(errors) == list(ours.dense) and all(0 < e < 1 for e in errors.values())
    assert told == list(range(1, 13))
    with torch.no_grad():
        for layer in cut.dense.values():
            keep = keep_best({"": Block(4).pool(layer.weight.abs(), "mean")}, 0.5)[""]
            layer.weight.mul_(Block(4).expand(keep))
    for layer in ours.dense.values():
        assert float(Block(4).held(layer.weight).float().mean()) == 0.5
    wanted = states_of(teacher, batches)
    own, others = (float((states_of(e, batches) - wanted).square().mean()) for e in (ours, cut))
    assert own < 0.35 * others


def test_nothing_to_prune_changes_nothing(tmp_path):
    folder = make_sentence_encoder(tmp_path / "m")
    teacher, student = load(folder), load(folder)
    batches = [batch for _, batch in in_order(make_features(teacher, TEXTS, 64), 50, teacher)]
    assert prune_post_training(student, teacher, batches, Block(4), {}, 0.01) == {}
    for (name, a), b in zip(student.model.named_parameters(), teacher.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    errors = prune_post_training(student, teacher, batches, Block(4), dict.fromkeys(student.dense, 0.0), 0.01)
    assert max(errors.values()) < 1e-3  # what bfloat16 leaves, where the machine multiplies in it


def test_layers_whose_sizes_blocks_do_not_divide_stay(tmp_path):
    folder = make_model(tmp_path / "m")
    teacher, student = load(folder), load(folder)
    dense = student.dense["1.intermediate.dense"]
    assert not Block(16).divides(torch.zeros(40, 32)) and Block(16).divides(dense.weight)
    batches = [batch for _, batch in in_order(make_features(teacher, TEXTS[:20], 64), 50, teacher)]
    errors = prune_post_training(student, teacher, batches, Block(16), {"1.intermediate.dense": 0.75}, 0.01)
    assert list(errors) == ["1.intermediate.dense"]
    assert float(Block(16).held(dense.weight).float().mean()) == 0.25
