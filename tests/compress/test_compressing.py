"""What users call: the recipe from options, the measured folder, the command."""

import builtins
import json
import sys
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

import transformers  # noqa: E402
from tiny_encoders import make_model, make_sentence_encoder, sentences  # noqa: E402

from whet import cli, compressing, measure_compressed  # noqa: E402
from whet.compress.make_recipe import GENTLE_RATE  # noqa: E402
from whet.compress.recipe import Recipe, Training  # noqa: E402
from whet.compressing import CompressionReport, Measured, make_recipe, plan  # noqa: E402
from whet.schedules.isa import ISAS  # noqa: E402


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text for text, _ in sentences(200)), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    rows = sentences(40, seed=5)
    path = tmp_path / "pairs.csv"
    lines = [f"{a},{b},{int(x == y)}" for (a, x), (b, y) in zip(rows[::2], rows[1::2], strict=True)]
    path.write_text("text_a,text_b,score\n" + "\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def briefly(monkeypatch):
    """Measure int8 alone, for a moment, with fewer kernels to generate."""
    monkeypatch.setattr("whet.bench.WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr("whet.bench.BLOCK_SECONDS", 0.001)
    monkeypatch.setattr(measure_compressed, "SECONDS", 0.001)
    monkeypatch.setattr(measure_compressed, "compile", partial(measure_compressed.compile, isa="avx2"))
    monkeypatch.setattr(measure_compressed, "PRECISIONS", ("int8",))


@pytest.mark.usefixtures("briefly")
def test_one_command_makes_a_measured_sparse_model(tmp_path, texts, pairs, capsys):
    folder = make_sentence_encoder(tmp_path / "m")
    output = tmp_path / "sparse"
    command = ["compress", folder, "--data", texts, "--task", "embedding", "--sparsity", 0.75, "--block", "4x4"]
    command += ["--development", pairs, "--test", pairs, "--set", "pruning.calibration=100", "-o", output, "--json"]
    assert cli.main([str(word) for word in command]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["sparsity"] == pytest.approx(0.75) and report["score_name"] == "Spearman"
    assert "version = 1" in err and "Spearman as it is" in err
    dense, sparse = report["measured"]
    assert (dense["model"], sparse["model"]) == ("dense", "sparse")
    assert sparse["zeros"] == pytest.approx(0.75, abs=0.05) and -1 <= sparse["scores"]["spearman"] <= 1
    assert set(sparse["milliseconds"]) == {"32", "64"}, "the model takes 64 tokens"
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "75.0% of the 4 × 4 blocks" in card and "| sparse int8 (7" in card and "[pruning]" in card
    assert f"{dense['scores']['spearman']:.4f}" in card
    assert Recipe.read(output / "recipe.toml").pruning.sparsity == 0.75
    assert json.loads((output / "measured.json").read_text()) == report
    model = transformers.AutoModel.from_pretrained(output)
    assert float((model.encoder.layer[0].output.dense.weight == 0).float().mean()) >= 0.75

    # The recipe that lies in the folder makes the same bits; what was not measured can be later.
    again = ["compress", "--recipe", str(output / "recipe.toml"), "--no-measure", "-o", str(tmp_path / "again")]
    assert cli.main(again) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert "| sparse int8" not in (tmp_path / "again/README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["compress", "--measure-only", "--test", str(pairs), "-o", str(tmp_path / "again"), "--json"]) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["sparsity"] == report["sparsity"] and later["data"] == str(pairs)
    assert [m["scores"] for m in later["measured"]] == [m["scores"] for m in report["measured"]]
    assert "| sparse int8" in (tmp_path / "again/README.md").read_text(encoding="utf-8")
    assert CompressionReport.from_json(json.dumps(later)).to_json() == json.dumps(later, indent=1)
    assert cli.main(again) == 1
    assert "again exists; name another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("briefly")
def test_a_tagger_is_scored_by_its_tags(tmp_path, capsys):
    rows = [
        "\n".join(f"{word} {'B-art' if word == 'the' else 'O'}" for word in text.split()) for text, _ in sentences(60)
    ]
    data = tmp_path / "tags.conll"
    data.write_text("\n\n".join(rows), encoding="utf-8")
    model, out = make_model(tmp_path / "m"), tmp_path / "out"
    command = f"compress {model} --task token_classification --data {data} --test {data} --sparsity 0 --steps 40 "
    command += f"--set training.learning_rate=0.003 -o {out} --json"
    assert cli.main(command.split()) == 0
    (tuned,) = json.loads(capsys.readouterr().out)["measured"]
    assert tuned["model"] == "fine-tuned" and tuned["scores"]["accuracy"] > 0.9 and tuned["scores"]["f1"] > 90


def test_only_what_was_made_can_be_measured(tmp_path, capsys):
    assert cli.main(["compress", "--measure-only", "-o", str(tmp_path)]) == 1
    assert "has no recipe.toml; expected a folder that whet compress made" in capsys.readouterr().err


def test_options_and_fields_make_a_recipe(tmp_path):
    folder = make_model(tmp_path / "m", "ForSequenceClassification", labels=("a", "b"))
    options = {"model": str(folder), "task": "sequence_classification", "data": ["a.csv"], "method": "magnitude"}
    recipe = make_recipe(None, options, ["training.batch=32", "data.columns.label=intent", "training.learning_rate=1"])
    assert recipe.teacher == str(folder) and recipe.distillation.labels == 1.0
    assert recipe.pruning.method == "magnitude" and recipe.pruning.updates == 20
    assert recipe.data.columns == {"label": "intent"} and recipe.training.batch == 32
    file = tmp_path / "r.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    changed = make_recipe(file, {"sparsity": 0.5, "teacher": ""}, ["pruning.updates=3"])
    assert changed.pruning.sparsity == 0.5 and changed.pruning.updates == 3 and changed.teacher == ""
    assert changed.data == recipe.data


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"sparsity": 0.5}, GENTLE_RATE),
        ({}, Training().learning_rate),
        ({"sparsity": 0.0}, Training().learning_rate),
        ({"sparsity": 0.5, "method": "magnitude"}, Training().learning_rate),
    ],
)
def test_the_learning_rate_is_low_where_little_was_pruned(tmp_path, options, rate):
    given = {"model": str(make_sentence_encoder(tmp_path / "m")), "task": "embedding", "data": ["a.txt"], **options}
    assert make_recipe(None, given).training.learning_rate == rate
    assert make_recipe(None, given, ["training.learning_rate=0.002"]).training.learning_rate == 0.002


def test_a_plan_is_as_fast_and_says_so_layer_by_layer(tmp_path, texts):
    folder = make_sentence_encoder(tmp_path / "m")
    options = {"model": str(folder), "task": "embedding", "data": [str(texts)], "sparsity": 0.7, "budget": "latency"}
    recipe = make_recipe(None, options, ["pruning.calibration=100"])
    planned = plan(recipe, "avx2")
    shares = planned.pruning.shares
    assert len(shares) == 12 and len(set(shares.values())) > 1
    shapes = {"intermediate.dense": (64, 32), "output.dense": (32, 64)}
    cycles = [
        sum(
            compressing._cycles(shapes.get(name.split(".", 1)[1], (32, 32)), 4, 1 - s, ISAS["avx2"])
            for name, s in layers.items()
        )
        for layers in (shares, dict.fromkeys(shares, 0.7))
    ]
    assert cycles[0] <= cycles[1]
    assert Recipe.from_table(planned.to_table()) == planned and planned.data == recipe.data


def test_a_model_without_the_head_has_no_teacher(tmp_path):
    folder = make_model(tmp_path / "m")
    recipe = make_recipe(None, {"model": str(folder), "task": "token_classification", "data": ["a.jsonl"]})
    assert recipe.teacher == "" and recipe.distillation.labels == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "embedding"], "no model is given"),
        (["m"], "no task is given"),
        (["m", "--task", "embedding", "--set", "training"], "'training' is no field of a recipe"),
        (["m", "--task", "embedding", "--set", "task.x=1"], "task is no table"),
        (["m", "--task", "embedding", "--teacher", "", "--set", "luck=1"], "luck is no field of a recipe"),
        (["m", "--task", "embedding", "--block", "3x3", "--teacher", ""], "block is '3x3'"),
        (["m", "--task", "embedding"], "m has no config.json"),
        (["m", "--task", "embedding", "--teacher", ""], "no data is given"),
        (["m", "--task", "embedding", "--teacher", "", "--data", "a.txt"], "a.txt does not exist"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compress", *words, "-o", "out"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("whet: error: ") and message in last


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("whet.compress.")]:
        if not name.endswith((".recipe", ".blocks")):
            monkeypatch.delitem(sys.modules, name)
    true_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    command = ["compress", "m", "--task", "embedding", "--teacher", "", "--data", "a.txt", "-o", str(tmp_path / "o")]
    assert cli.main(command) == 1
    assert "pip install '.[compile,compress]'" in capsys.readouterr().err


def test_the_table_has_a_row_per_module():
    measured = tuple(
        Measured("sparse", precision, {"accuracy": 0.9}, {32: 0.5, 128: 1.25}, 12_300_000, 0.8)
        for precision in ("fp32", "int8")
    )
    report = CompressionReport("o", 0.8, 0.9, "accuracy", 0.91, 10.0, "a CPU", "test.csv", measured)
    assert report.table().splitlines() == [
        "|  | accuracy | ms at 32 tokens | ms at 128 tokens | MB |",
        "| --- | --- | --- | --- | --- |",
        "| sparse fp32 | 0.9000 | 0.500 | 1.250 | 12.3 |",
        "| sparse int8 (80% zeros) | 0.9000 | 0.500 | 1.250 | 12.3 |",
    ]
    assert "on test.csv, one thread of a CPU:" in str(report)
