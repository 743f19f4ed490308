"""From a model and requests to a freeze file to a module whose requests leave early."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import whet
from whet import cli
from whet.bench_exits import bench_exits
from whet.caching.file import FreezeError, load
from whet.datasets import LabelledText
from whet.freezing import _thinned, fit, inspect
from whet.runtime.audit import Request, expected_loss
from whet.runtime.metadata import ArtifactError


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
    assert sum(report.leave) == pytest.approx(1) and len(report.leave) == 3
    assert report.cache_accuracy[1] > 0.5
    assert "after 2 layers" in str(report)


@pytest.fixture(scope="module")
def modules(frozen, model, tmp_path_factory):
    """Paths of the module with the caches of the freeze file, and of the plain one."""
    folder = tmp_path_factory.mktemp("modules")
    whet.compile(model, folder / "plain.so", "fp32", isa="avx2")
    whet.compile(model, folder / "frozen.so", "fp32", isa="avx2", freeze=frozen[0], dump_ir=folder / "ir")
    return folder / "frozen.so", folder / "plain.so"


def test_a_module_answers_as_the_file_says(frozen, modules, texts):
    freeze = load(frozen[0])
    assert freeze.caches  # else the costs of this machine are strange, and there is nothing to see
    assert list(modules[0].parent.glob("ir/*_freeze_layers.py"))
    session, plain_session = (whet.load(path, threads=1) for path in modules)
    plain, early = plain_session.logits(texts), session.logits(texts)
    answers, layers, trust = session.trace(texts)
    np.testing.assert_array_equal(answers, early)
    assert session.metadata.exits == (*(cache.layer for cache in freeze.caches), 2)
    np.testing.assert_array_equal((plain == early).all(axis=1), layers == 2)
    thresholds = {cache.layer: cache.threshold for cache in freeze.caches} | {2: 1}
    assert (trust >= np.array([thresholds[layer] for layer in layers], np.float32)).all()
    assert (layers == 2).mean() < 0.7
    assert (plain.argmax(1) == early.argmax(1)).mean() >= 0.6


def test_thresholds_can_be_changed_in_one_session(modules, texts):
    strict, other = (whet.load(modules[0], threads=1) for _ in range(2))
    plain = whet.load(modules[1], threads=1)
    before = other.logits(texts)
    strict.thresholds[:] = 2
    np.testing.assert_array_equal(strict.logits(texts), plain.logits(texts))
    np.testing.assert_array_equal(other.logits(texts), before)
    assert (whet.load(modules[0]).thresholds < 2).all()
    assert plain.thresholds is None
    with pytest.raises(ValueError, match=r"plain\.so has no caches"):
        plain.trace(texts)


def test_audits(modules, texts, tmp_path):
    path = shutil.copy(modules[0], tmp_path / "m.so")
    watched, other = whet.load(path, threads=1, audit=1.0), whet.load(path, threads=1)
    np.testing.assert_array_equal(watched.logits(texts[:200]), other.logits(texts[:200]))
    watched.auditor.wait()
    assert watched.auditor.count == 200
    plain = whet.load(modules[1], threads=1).logits(texts[:200])
    classes = other.logits(texts[:200]).argmax(1)
    loss = np.mean([expected_loss(one, logits) for one, logits in zip(classes, plain, strict=True)])
    assert 0.3 <= watched.metadata.allowed_loss < 1  # as much as the budget, at least: nothing is tightened
    assert watched.auditor.loss == pytest.approx(loss, abs=1e-5)
    np.testing.assert_array_equal(watched.thresholds, other.thresholds)
    assert (tmp_path / "m.so.audit").exists()
    with pytest.raises(ValueError, match=r"plain\.so has no caches to audit"):
        whet.load(modules[1], audit=0.1)


def test_caches_learn_what_was_asked(modules, model, texts, tmp_path):
    path = shutil.copy(modules[0], tmp_path / "m.so")
    session = whet.load(path, threads=1, audit=1.0)
    session.logits([f"{text} {text}" for text in texts[:200]])
    session.auditor.wait()
    again = ["freeze", "fit", str(model), "--precision", "fp32", "--budget", "0.3", "-o", str(tmp_path / "b.freeze")]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert cli.main([*again, "--data", str(tmp_path / "texts.txt"), "--served", f"{path}.audit"]) == 0
    assert inspect(tmp_path / "b.freeze").requests == (700, 100)
    with pytest.raises(ValueError, match="both held_out and served say what to choose on"):
        fit(model, tmp_path / "c.freeze", texts, texts, served=f"{path}.audit")
    (tmp_path / "m.so.audit").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match=r"m\.so\.audit is damaged or keeps no audits"):
        fit(model, tmp_path / "c.freeze", texts, served=f"{path}.audit")


def test_requests_of_no_class_are_passed_on(modules, model, texts, tmp_path):
    words = sorted({word for text in texts for word in text.split()})[:12]
    strange = [" ".join(np.random.default_rng(i).choice(words, 6)) for i in range(300)]
    (tmp_path / "strange.txt").write_text("\n".join(strange[:200]))
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = ["freeze", "fit", str(model), "--data", str(tmp_path / "texts.txt"), "--precision", "fp32"]
    command += ["--budget", "0.3", "--unlike", str(tmp_path / "strange.txt"), "-o", str(tmp_path / "b.freeze")]
    assert cli.main(command) == 0
    whet.compile(model, tmp_path / "m.so", "fp32", isa="avx2", freeze=tmp_path / "b.freeze")
    sessions = [whet.load(path, threads=1) for path in (modules[0], tmp_path / "m.so")]
    for session in sessions:
        session.thresholds[:] = 0  # all leave at the first cache
    (known, before), (now_known, now) = ([s.trace(some)[2].mean() for some in (texts, strange[200:])] for s in sessions)
    assert now < 0.7 * before and now_known > 0.8 * known
    with pytest.raises(ValueError, match="unlike is for learned caches alone"):
        fit(model, tmp_path / "c.freeze", texts, unlike=strange, kind="knn")


def test_no_copy_is_empty_even_where_a_tokenizer_adds_nothing():
    request, rng = Request(np.array([7]), np.arange(1), None), np.random.default_rng(0)
    assert all(len(_thinned(request, np.array([], int), rng).ids) == 1 for _ in range(50))
    long = Request(np.arange(400), np.arange(400), np.arange(400) % 2)
    ids, positions, types = _thinned(long, np.array([0, 399]), rng)
    assert 260 <= len(ids) < 380 and {0, 399} <= set(ids.tolist())
    assert positions.tolist() == list(range(len(ids))) and (types == ids % 2).all()


def test_bench(modules, texts, tmp_path, capsys):
    frozen, plain = map(str, modules)
    session, other = (whet.load(path, threads=1) for path in modules)
    rows = [LabelledText(text, str(i % 2)) for i, text in enumerate(texts[:60])]
    report = bench_exits(frozen, plain, rows, timed=7)
    layers = session.trace(texts[:60]).layers
    assert report.leave == {layer: (layers == layer).mean() for layer in session.metadata.exits}
    assert report.effective_layers == layers.mean() and (report.requests, report.timed) == (60, 7)
    classes = [s.logits(texts[:60]).argmax(1) for s in (session, other)]
    assert report.accuracy == tuple((found == np.arange(60) % 2).mean() for found in classes)
    assert report.agreement == (classes[0] == classes[1]).mean()
    assert 0 < report.frozen.p50 <= report.frozen.p99 and report.plain.mean > 0
    (tmp_path / "texts.txt").write_text("\n".join(texts[:9]))
    arguments = ["bench", frozen, "--plain", plain, "--data", str(tmp_path / "texts.txt"), "--json"]
    assert cli.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["accuracy"] is None and document["requests"] == 9
    assert cli.main(arguments[:4]) == 1
    assert "no requests to compare on" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"plain\.so has no caches; compile"):
        bench_exits(plain, plain, rows)
    with pytest.raises(ValueError, match=r"frozen\.so has caches too"):
        bench_exits(frozen, frozen, rows)


def test_nearest_neighbours(model, texts, tmp_path):
    report = fit(model, tmp_path / "a.freeze", texts, kind="knn", precision="fp32", budget=0.3, isa="avx2")
    freeze = load(tmp_path / "a.freeze")
    assert report.kind == "knn" and freeze.caches and {cache.kind for cache in freeze.caches} == {"clusters"}
    assert report.accuracy >= 0.7
    whet.compile(model, tmp_path / "frozen.so", "fp32", isa="avx2", freeze=tmp_path / "a.freeze")
    session = whet.load(tmp_path / "frozen.so", threads=1)
    _, layers, _ = session.trace(texts)
    share = sum(report.leave[:-1])
    assert (layers < 2).mean() > share - 0.15  # and more than that of those that it was fitted to


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
    with pytest.raises(ValueError, match="kind is 'trees'; expected one of learned, knn"):
        fit(model, tmp_path / "a.freeze", texts, kind="trees")
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
