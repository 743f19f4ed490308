"""A module with caches that uses records: what is built, what grows, and that the command line makes it."""

import json

import numpy as np
import pytest
from memo_files import look_up_everywhere, make_texts

import whet
from whet import cli
from whet.caching.cache import Cache
from whet.caching.file import Freeze, save
from whet.caching.learn import perceptron
from whet.compiler import import_model
from whet.memoizing import build
from whet.passes.graph import digest_of
from whet.runtime.memo_file import MemoFile

LAYERS, CHANNELS, LABELS = 2, 32, 3


@pytest.fixture(scope="module")
def texts(references):
    return make_texts(references)


@pytest.fixture(scope="module")
def modules(references, tmp_path_factory):
    """A module with caches that use records, and one without caches."""
    folder = tmp_path_factory.mktemp("modules")
    model = references / "bert-sequence"
    rng = np.random.default_rng(1)
    numbers = ((0.3, (8, CHANNELS)), (0.1, 8), (1, (LABELS, 8)), (0.1, LABELS), (1, CHANNELS), (0.1, CHANNELS))
    first, first_bias, second, second_bias, *standard = (rng.normal(0, r, s).astype("float32") for r, s in numbers)
    arrays = perceptron((first, first_bias), (second, second_bias), *standard)
    caches = tuple(Cache(layer, "perceptron", arrays, threshold) for layer, threshold in ((0, 0.3), (1, 0.45)))
    digest = digest_of(import_model(model).module)
    save(Freeze("bert-sequence", digest, "int8", LAYERS, 0.1, 0.005, (), caches, {}), folder / "a.freeze")
    compile_ = ["compile", str(model), "--isa", "avx2", "--memo", "-o"]
    assert cli.main([*compile_, str(folder / "both.so"), "--freeze", str(folder / "a.freeze")]) == 0
    assert cli.main([*compile_, str(folder / "memo.so")]) == 0
    return folder / "both.so", folder / "memo.so"


@pytest.fixture(scope="module")
def memo(modules, texts, tmp_path_factory):
    """A file that was built by the module with caches; all lengths look up, strict finds the same only."""
    path = tmp_path_factory.mktemp("memo") / "a.memo"
    build(modules[0], path, texts[:180], texts[180:], memory=32 << 20)
    look_up_everywhere(path)
    return path


def test_records_that_it_builds_have_all_layers(modules, memo, texts):
    both, alone = (whet.load(path, threads=1) for path in modules)
    assert both.metadata.records == alone.metadata.records
    assert 0 < (both.trace(texts[:180]).layers == LAYERS).sum() < 180
    assert MemoFile(memo).count == 180
    used = whet.load(modules[1], threads=1, memo=memo, memo_level="strict")
    np.testing.assert_array_equal(used.logits(texts), alone.logits(texts))
    assert used.memo.hits == 180


def test_repeats_leave_where_they_left_and_keep_their_bits(modules, memo, texts):
    without, session = whet.load(modules[0], threads=1), whet.load(modules[0], threads=1, memo=memo)
    mixed = [text for pair in zip(texts[:100], texts[180:280], strict=True) for text in pair]
    for batch in (mixed, texts[:1], texts[299:]):
        for wanted, got in zip(without.trace(batch), session.trace(batch), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert session.memo.hits == 101
    layers = without.trace(mixed).layers
    assert all(set(layers[side::2].tolist()) == {0, 1, 2} for side in (0, 1))


def test_only_who_runs_to_the_end_adds_a_record(modules, memo, texts, tmp_path):
    path = tmp_path / "a.memo"
    path.write_bytes(memo.read_bytes())
    session = whet.load(modules[0], threads=1, memo=path, memo_level="strict", memo_grow=True)
    trace = session.trace(texts)
    stayed = trace.layers[180:] == LAYERS
    assert 0 < stayed.sum() < 120
    assert session.memo.file.count == 180 + stayed.sum()
    session.memo.file.verify()
    alone, used = (whet.load(modules[1], threads=1, **options) for options in ({}, {"memo": path}))
    np.testing.assert_array_equal(used.logits(texts), alone.logits(texts))
    assert used.memo.hits == session.memo.file.count


def test_command_line(modules, memo, texts, tmp_path, capsys):
    both, alone = map(str, modules)
    assert cli.main(["inspect", both]) == 0
    described = capsys.readouterr().out
    assert "Attention of earlier requests can be used" in described and "Requests may leave early" in described
    requests = tmp_path / "requests.txt"
    requests.write_text("\n".join(texts[170:190]))
    assert cli.main(["bench", both, "--memo", str(memo), "--texts", str(requests), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hits"], found["same"]) == (10, 1)
    assert cli.main(["bench", both, "--plain", alone, "--data", str(requests), "--json"]) == 0
    leave = json.loads(capsys.readouterr().out)["leave"]
    assert sum(leave.values()) == pytest.approx(1) and leave["0"] > 0
    assert cli.main(["run", both, texts[0], "--memo", str(memo)]) == 0
