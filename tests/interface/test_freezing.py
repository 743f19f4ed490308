"""From a model and requests to a freeze file to a module whose requests leave early."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import whet
from whet import cli
from whet.caching.file import FreezeError, load
from whet.freezing import fit, inspect


@pytest.fixture(scope="module")
def model(references):
    return references / "bert-sequence"


@pytest.fixture(scope="module")
def texts(model):
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
    words = sorted(w for w in vocabulary if w.isalpha())
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, n)) for n in rng.integers(1, 20, 600)]


@pytest.fixture(scope="module")
def frozen(model, texts, tmp_path_factory):
    """A freeze file that lets all but a few leave, and the report."""
    path = tmp_path_factory.mktemp("freeze") / "a.freeze"
    return path, fit(model, path, texts, precision="fp32", budget=0.3, isa="avx2")


def test_report(frozen):
    path, report = frozen
    assert inspect(path) == report
    assert report.requests == (480, 120)
    assert report.plain_accuracy == 1 and report.accuracy >= 0.7
    assert sum(report.leave) == pytest.approx(1) and len(report.leave) == 2
    assert report.cache_accuracy[0] > 0.5
    assert "layer 2" in str(report)


def test_a_module_answers_as_the_file_says(frozen, model, texts, tmp_path):
    path, _ = frozen
    freeze = load(path)
    assert len(freeze.caches) == 1  # else the costs of this machine are strange, and there is nothing to see
    whet.compile(model, tmp_path / "plain.so", "fp32", isa="avx2")
    whet.compile(model, tmp_path / "frozen.so", "fp32", isa="avx2", freeze=path, dump_ir=tmp_path / "ir")
    assert list((tmp_path / "ir").glob("*_freeze_layers_avx2.py"))
    plain, early = (whet.load(tmp_path / f"{name}.so", threads=1).logits(texts) for name in ("plain", "frozen"))
    ran_to_the_end = (plain == early).all(axis=1)
    exps = np.exp(early - early.max(1, keepdims=True))
    confident = 1 / exps.sum(1) >= freeze.caches[0].threshold
    assert confident[~ran_to_the_end].all()
    assert ran_to_the_end.mean() < 0.7
    assert (plain.argmax(1) == early.argmax(1)).mean() >= 0.6


def test_a_file_of_another_model_or_precision_is_refused(frozen, references, model, tmp_path):
    path, _ = frozen
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, tmp_path / "other" / "model.safetensors")
    with pytest.raises(FreezeError, match="for the model bert-sequence with other weights than these"):
        whet.compile(tmp_path / "other", tmp_path / "a.so", "fp32", freeze=path)
    with pytest.raises(FreezeError, match="fitted to fp32, the precision is int8"):
        whet.compile(model, tmp_path / "a.so", freeze=path)
    with pytest.raises(ValueError, match=r"sparsity is 0\.5, but .*a\.freeze is for the weights as they are"):
        whet.compile(model, tmp_path / "a.so", "fp32", freeze=path, sparsity=0.5)
    with pytest.raises(ValueError, match="freezing is for sequence classification"):
        whet.compile(references / "bert-token", tmp_path / "a.so", "fp32", freeze=path)


def test_what_can_not_be_fitted(references, model, texts, tmp_path):
    with pytest.raises(ValueError, match="freezing is for sequence classification"):
        fit(references / "bert-token", tmp_path / "a.freeze", texts)
    with pytest.raises(ValueError, match=r"there are 40 requests to fit on; expected at least 100"):
        fit(model, tmp_path / "a.freeze", texts[:50])
    with pytest.raises(ValueError, match=r"budget is 1\.5"):
        fit(model, tmp_path / "a.freeze", texts, budget=1.5)
    with pytest.raises(FileNotFoundError, match="create it"):
        fit(model, tmp_path / "absent" / "a.freeze", texts)


def test_command_line(frozen, tmp_path, capsys):
    path, report = frozen
    assert cli.main(["freeze", "inspect", str(path)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    (tmp_path / "b.freeze").write_bytes(b"x")
    assert cli.main(["freeze", "inspect", str(tmp_path / "b.freeze")]) == 1
    assert "is damaged or no freeze file" in capsys.readouterr().err
