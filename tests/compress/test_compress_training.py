"""Whole runs of recipes on small models: they learn, keep their masks, and survive being killed."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from safetensors.torch import load_file  # noqa: E402
from tiny_encoders import load, make_model, make_sentence_encoder, sentences  # noqa: E402

from whet.compress.blocks import Block  # noqa: E402
from whet.compress.features import make_features  # noqa: E402
from whet.compress.recipe import Data, Distillation, Pruning, Recipe, Training  # noqa: E402
from whet.compress.run import run_recipe, work_folder  # noqa: E402
from whet.progress import Silent  # noqa: E402

PYTHON = [sys.executable, "-c"]


@pytest.fixture(autouse=True)
def one_thread():
    """More threads only wait for each other on such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text for text, _ in sentences(300)), encoding="utf-8")
    return path


@pytest.fixture
def topics(tmp_path):
    path = tmp_path / "topics.csv"
    path.write_text("text,label\n" + "\n".join(f"{a},{b}" for a, b in sentences(400)), encoding="utf-8")
    return path


def go(recipe, output):
    return run_recipe(recipe, output, Silent(), lambda line: None)


def zero_blocks(folder, task="embedding"):
    encoder = load(folder, task)
    held = [Block(4).held(layer.weight) for layer in encoder.dense.values()]
    return [1 - float(h.float().mean()) for h in held]


def classifier(topics, model, **more):
    return Recipe(
        model=str(model),
        task="sequence_classification",
        data=Data(train=(str(topics),)),
        pruning=Pruning(sparsity=0.0),
        distillation=Distillation(labels=1.0),
        training=Training(steps=80, batch=16, learning_rate=2e-3),
        **more,
    )


def test_a_classifier_is_fine_tuned_then_pruned_and_distilled(tmp_path, topics):
    dense = tmp_path / "dense"
    made = go(classifier(topics, make_sentence_encoder(tmp_path / "m")), dense)
    assert (dense / "tokenizer.json").is_file()
    assert not (dense / "modules.json").exists(), "that would make it an embedding model again"
    assert made.score > 0.85 > made.before and made.sparsity == 0
    recipe = classifier(topics, dense, teacher=str(dense))
    pruning = Pruning(sparsity=0.8, calibration=200)
    sparse = go(replace(recipe, pruning=pruning, training=replace(recipe.training, steps=60)), tmp_path / "sparse")
    assert sparse.before == made.score and sparse.score > 0.7, "of 20 rows, of which chance finds a third"
    assert all(s == pytest.approx(0.8, abs=0.02) for s in zero_blocks(tmp_path / "sparse", "sequence_classification"))
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert set(config["id2label"].values()) == {"food", "music", "sport"}


def test_a_teacher_teaches_what_has_no_labels(tmp_path, topics, texts):
    teacher, few = tmp_path / "teacher", tmp_path / "few.csv"
    go(classifier(topics, make_sentence_encoder(tmp_path / "m")), teacher)
    few.write_text("".join(topics.read_text(encoding="utf-8").splitlines(keepends=True)[:13]), encoding="utf-8")
    recipe = classifier(topics, tmp_path / "m", teacher=str(teacher))
    alone = Data(train=(str(few),), development=(str(topics),))
    helped = replace(alone, unlabelled=(str(texts),))
    first, second = (
        go(replace(recipe, data=data), tmp_path / name).score for name, data in (("alone", alone), ("helped", helped))
    )
    assert second > first + 0.05, "few.csv has 12 rows"


@pytest.mark.parametrize("method", ["magnitude", "movement", "snip_momentum", "reconstruct"])
def test_sparsity_grows_to_what_was_asked_for(tmp_path, texts, method):
    folder = make_sentence_encoder(tmp_path / "m")
    recipe = Recipe(
        model=str(folder),
        teacher=str(folder),
        task="embedding",
        data=Data(train=(str(texts),)),
        pruning=Pruning(method=method, sparsity=0.75, updates=3, end=0.6, calibration=100),
        distillation=Distillation(relations=1.0),
        training=Training(steps=30, batch=16, learning_rate=1e-3, evaluate_every=1),
    )
    made = go(recipe, tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    seen = [entry["sparsity"] for entry in log]
    assert seen == sorted(seen) and len({round(s, 3) for s in seen} - {0.0}) == 3
    assert seen[-1] == pytest.approx(0.75) == made.sparsity
    assert zero_blocks(tmp_path / "out") == pytest.approx([0.75] * 12)
    assert {"outputs", "states", "relations"} == set(log[0]["loss"])
    assert made.score > 0.5 and made.score_name == "cosine to the teacher"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_a_global_budget_is_shared_unevenly(tmp_path, texts):
    folder = make_sentence_encoder(tmp_path / "m")
    pruning = Pruning(method="magnitude", sparsity=0.5, budget="global")
    made = go(Recipe(str(folder), "embedding", data=Data(train=(str(texts),)), pruning=pruning), tmp_path / "out")
    assert made.sparsity == pytest.approx(0.5, abs=0.001)
    assert len(set(zero_blocks(tmp_path / "out"))) > 1


@pytest.mark.parametrize("method", ["magnitude", "reconstruct"])
def test_layers_may_have_sparsities_of_their_own(tmp_path, texts, method):
    folder = make_sentence_encoder(tmp_path / "m")
    shares = {"0.output.dense": 0.25, "1.attention.self.value": 0.0}
    pruning = Pruning(method=method, sparsity=0.5, shares=shares, calibration=100)
    go(Recipe(str(folder), "embedding", data=Data(train=(str(texts),)), pruning=pruning), tmp_path / "out")
    dense = load(tmp_path / "out").dense
    found = {name: 1 - float(Block(4).held(layer.weight).float().mean()) for name, layer in dense.items()}
    assert found == {name: shares.get(name, 0.5) for name in dense}


def test_a_locked_mask_survives_fine_tuning(tmp_path, texts, topics):
    folder = make_model(tmp_path / "m")
    pruned = tmp_path / "pruned"
    go(Recipe(str(folder), "embedding", data=Data(train=(str(texts),)), pruning=Pruning(sparsity=0.7)), pruned)
    made = go(replace(classifier(topics, pruned), pruning=Pruning(method="lock")), tmp_path / "tuned")
    before, after = load(pruned).dense, load(tmp_path / "tuned", "sequence_classification").dense
    for name, layer in before.items():
        assert torch.equal(Block(4).held(layer.weight), Block(4).held(after[name].weight))
        assert not torch.equal(layer.weight, after[name].weight)
    assert made.score > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path, topics):
    recipe = classifier(topics, make_model(tmp_path / "m"))
    recipe = replace(recipe, training=replace(recipe.training, steps=5))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(replace(recipe, seed=seed), tmp_path / name)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


RUN = """
import sys, torch
from pathlib import Path
from whet.compress.recipe import Recipe
from whet.compress.run import run_recipe
from whet.progress import Silent
torch.set_num_threads(1)
run_recipe(Recipe.read(sys.argv[1]), Path(sys.argv[2]), Silent(), lambda line: None)
"""


def test_killed_and_resumed_is_never_interrupted(tmp_path, texts):
    folder = make_sentence_encoder(tmp_path / "m")
    recipe = Recipe(
        model=str(folder),
        teacher=str(folder),
        task="embedding",
        data=Data(train=(str(texts),)),
        pruning=Pruning(method="movement", sparsity=0.75, updates=6, end=0.9),
        training=Training(steps=150, batch=8, checkpoint_every=10, evaluate_every=100),
    )
    file = tmp_path / "r.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    go(recipe, tmp_path / "whole")
    output = tmp_path / "killed"
    checkpoint = work_folder(output) / "checkpoint.safetensors"
    process = subprocess.Popen([*PYTHON, RUN, str(file), str(output)])
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and checkpoint.exists() and not output.exists()
    go(recipe, output)
    whole, resumed = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", output))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not work_folder(output).exists()


def test_nothing_is_overwritten(tmp_path, texts):
    folder = make_sentence_encoder(tmp_path / "m")
    recipe = Recipe(str(folder), "embedding", data=Data(train=(str(texts),)), pruning=Pruning(sparsity=0.5))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists; name another folder, or remove it"):
        go(recipe, tmp_path / "out")
    work = work_folder(tmp_path / "new")
    work.mkdir()
    (work / "recipe.toml").write_text(replace(recipe, seed=1).to_toml(), encoding="utf-8")
    with pytest.raises(FileExistsError, match="unfinished run of another recipe"):
        go(recipe, tmp_path / "new")


def test_another_tasks_head_gives_way_to_a_new_one(tmp_path, topics):
    tagger = make_model(tmp_path / "m", "ForTokenClassification", labels=("O", "X", "Y", "Z"))
    made = go(classifier(topics, tagger), tmp_path / "out")
    assert made.score > 0.6 > made.before, "of 20 rows, of which chance finds a third"


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, topics):
    recipe = classifier(topics, make_model(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+; lower training.learning_rate"):
        go(replace(recipe, training=replace(recipe.training, learning_rate=1e30)), tmp_path / "out")


def test_heads_that_are_no_choice_are_refused(tmp_path, topics):
    model = make_model(tmp_path / "m", "ForSequenceClassification", labels=("score",))
    with pytest.raises(ValueError, match="scores 1 labels independently; expected a choice"):
        go(classifier(topics, model), tmp_path / "out")


def test_teachers_that_do_not_fit_are_refused(tmp_path, topics):
    model = make_model(tmp_path / "m")
    with pytest.raises(ValueError, match="has no head for sequence_classification; fine-tune it first"):
        go(classifier(topics, model, teacher=str(model)), tmp_path / "out")
    other = make_model(tmp_path / "t", "ForSequenceClassification", labels=("a", "b"))
    with pytest.raises(ValueError, match="has other labels"):
        go(classifier(topics, model, teacher=str(other)), tmp_path / "out2")


def distilled_from_more(recipe, model, rows):
    """A student of ``model``, one in two of whose batches has no labels at all, is as good."""
    more = model.with_name("more.tsv" if "\t" in rows[0] else "more.txt")
    more.write_text("\n".join(["text_a\ttext_b"] * ("\t" in rows[0]) + rows * 20), encoding="utf-8")
    data = replace(recipe.data, unlabelled=(str(more),))
    training = replace(recipe.training, steps=10, batch=1)
    made = go(
        replace(recipe, model=str(model), teacher=str(model), data=data, training=training),
        model.with_name(f"{model.name}-2"),
    )
    assert made.score > 0.9


def test_tags_and_answers_are_learned(tmp_path):
    rows = [
        json.dumps({"words": t.split(), "tags": ["X" if w in ("the", "of", "a") else "O" for w in t.split()]})
        for t, _ in sentences(300)
    ]
    (tmp_path / "tags.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = Recipe(
        model=str(make_model(tmp_path / "m", family="distilbert")),
        task="token_classification",
        data=Data(train=(str(tmp_path / "tags.jsonl"),)),
        pruning=Pruning(sparsity=0.5, calibration=100),
        distillation=Distillation(labels=1.0),
        training=Training(steps=150, batch=16, learning_rate=2e-3),
    )
    made = go(recipe, tmp_path / "tagger")
    assert made.score > 0.9 and made.score_name == "tag accuracy"
    distilled_from_more(recipe, tmp_path / "tagger", [t for t, _ in sentences(20)])

    def article(i, text, topic):
        first = text.split()[0]
        qas = [{"id": str(i), "question": "food", "answers": [{"text": first, "answer_start": 0}]}]
        return {"title": str(i), "paragraphs": [{"context": text, "qas": qas}]}

    data = [article(i, *row) for i, row in enumerate(sentences(300))]
    (tmp_path / "q.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    recipe = replace(
        recipe,
        model=str(make_model(tmp_path / "q")),
        task="question_answering",
        data=Data(train=(str(tmp_path / "q.json"),)),
    )
    made = go(recipe, tmp_path / "reader")
    assert made.score > 0.9 and not math.isnan(made.before) and made.score_name == "token F1"
    assert Path(tmp_path / "reader" / "tokenizer.json").is_file()
    distilled_from_more(recipe, tmp_path / "reader", [f"food\t{t}" for t, _ in sentences(20)])
    assert make_features(load(tmp_path / "reader", "question_answering"), [("food", "")], 64) == [], "nothing to read"
