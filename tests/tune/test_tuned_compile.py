"""From a model to its kernels, and from records to a compiled module."""

import json

import numpy as np
import pytest
from laboratory import ISAS

import whet
from whet import cli
from whet.compiler import import_model
from whet.runtime.cpu import cpu_flags
from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.tune.records import Record, Records
from whet.tune.report import report
from whet.tune.space import space
from whet.tuning import kernel_instances, tune

AVX2 = ISAS["avx2"]


@pytest.fixture(scope="module")
def source(references):
    return references / "bert-embedding"


@pytest.fixture(scope="module")
def records(source, tmp_path_factory):
    """Verdicts for all kernels of the model, none of them its default."""
    folder = tmp_path_factory.mktemp("records")
    opened = Records.open(folder, AVX2)
    for instance in kernel_instances(import_model(source), AVX2):
        settings = (instance.knobs(values) for values in space(instance))
        knobs = next(k for k in settings if k != instance.default_knobs())
        ones = (0.9,) * len(instance.tokens)
        opened.add(Record(instance, knobs, ones, ones, settled=True))
    return folder


def test_every_kernel_with_knobs_is_found_with_its_uses(source):
    found = kernel_instances(import_model(source), AVX2)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    assert set(found.values()) == {layers}
    assert sum(isinstance(i.spec, AttentionSpec) for i in found) == 1
    assert sum(isinstance(i.spec, DenseSpec) for i in found) == 4
    assert {i.isa for i in found} == {"avx2"}


def test_sparse_layers_have_their_density(source):
    model = import_model(source)
    found = kernel_instances(model, AVX2, sparsity=0.75, block_rows=4)
    assert {i.density for i in found if isinstance(i.spec, DenseSpec) and i.spec.weight == "i8_sparse"} == {0.25}


def test_static_activations_are_other_kernels(source):
    model = import_model(source)
    static = whet.QuantisationConfig(method="minmax", activations="static")
    assert set(kernel_instances(model, AVX2)) - set(kernel_instances(model, AVX2, quantisation=static))


def test_compiling_uses_the_records_and_gives_the_same_answers(source, records, tmp_path):
    modules = {}
    for name, options in {"tuned": {"records": records}, "plain": {}}.items():
        report = whet.compile(source, tmp_path / f"{name}.so", isa="avx2", **options)
        modules[name] = tmp_path / f"{name}.so", report
    assert any(note.startswith("Knobs of 5 of 5 kernels come from records") for note in modules["tuned"][1].notes)
    assert not any(note.startswith("Knobs of 5") for note in modules["plain"][1].notes)
    # Other knobs pack weights otherwise: the file shows that they were used.
    assert modules["tuned"][0].read_bytes() != modules["plain"][0].read_bytes()
    if not cpu_flags().issuperset(AVX2.cpu_flags):
        pytest.skip("this CPU lacks AVX2")
    answers = [whet.load(path, threads=1).encode(["a text to compare"]) for path, _ in modules.values()]
    np.testing.assert_array_equal(*answers)


def test_a_missing_folder_of_records_is_an_error(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        whet.compile(source, tmp_path / "m.so", isa="avx2", records=tmp_path / "none")


def test_tuning_needs_a_budget_and_a_cpu_that_can(source, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="neither trials nor minutes"):
        tune(source, tmp_path, isa="avx2")
    monkeypatch.setattr("whet.tune.machine.cpu_flags", frozenset)
    with pytest.raises(ValueError, match="lacks"):
        tune(source, tmp_path, isa="avx2", trials=1)


def test_commands_report_and_merge(records, tmp_path, capsys):
    assert cli.main(["tune", "merge", str(tmp_path / "all"), str(records), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out).values()) == [5]
    assert cli.main(["tune", "report", str(tmp_path / "all")]) == 0
    assert "5 kernels, +11.1%" in capsys.readouterr().out
    picture = tmp_path / "gains.svg"
    assert cli.main(["tune", "report", str(tmp_path / "all"), "--picture", str(picture)]) == 0
    assert picture.read_text().startswith("<svg") and capsys.readouterr().out
    assert cli.main(["tune", "report", str(tmp_path)]) == 1
    assert "no records" in capsys.readouterr().err


def test_the_command_tunes(source, records, tmp_path, monkeypatch, capsys):
    asked = {}

    def stand_in(*args, progress, **options):
        asked.update(options, args=args)
        return report(records)

    monkeypatch.setattr("whet.tuning.tune", stand_in)
    arguments = ["--records", str(tmp_path), "--trials", "9", "--minutes", "1.5", "--activations", "static"]
    assert cli.main(["tune", str(source), *arguments]) == 0
    assert asked["args"] == (str(source), str(tmp_path))
    assert asked["trials"] == 9 and asked["minutes"] == 1.5 and asked["quantisation"].activations == "static"
    assert "geometric mean" in capsys.readouterr().out
