"""Records that ship with Whet: used where they hold, told of where they don't."""

import json

import pytest

from whet.schedules.dense import DenseSpec
from whet.schedules.gemm import Blocking
from whet.schedules.isa import ISAS
from whet.tune import records as module
from whet.tune.instance import Instance
from whet.tune.machine import cpu_type
from whet.tune.records import SHIPPED, Record, Records, TunedKnobs, file_name
from whet.tune.ship import ship

AVX2 = ISAS["avx2"]
LAYER, OTHER = DenseSpec(64, 32, "i8"), DenseSpec(32, 32, "i8")
KNOBS = Blocking(4, 2, 8, 32)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(module, "SHIPPED", folder)
    return folder


@pytest.fixture
def tuned(tmp_path):
    """A folder with two verdicts, one of them the default."""
    folder = tmp_path / "records"
    folder.mkdir()
    records = Records.open(folder, AVX2)
    records.add(Record(Instance.of(LAYER, AVX2), Blocking(8, 1, 8, 32), (0.9,) * 4, (1e-6,) * 4))
    for spec, knobs in ((LAYER, KNOBS), (OTHER, Instance.of(OTHER, AVX2).default_knobs())):
        records.add(Record(Instance.of(spec, AVX2), knobs, (0.8,) * 4, (1e-6,) * 4, settled=True))
    return folder


def test_verdicts_are_used_by_default(shipped, tuned):
    assert ship([tuned], shipped) == {file_name("avx2", cpu_type()): 1}
    untuned = TunedKnobs(None, [AVX2])
    assert untuned(LAYER, AVX2, 1.0) == KNOBS and untuned(OTHER, AVX2, 1.0) is None
    assert untuned.notes() == (f"Knobs of 1 of 2 kernels come from records of {cpu_type()} that ship with Whet.",)


def test_shipping_again_replaces_what_is_known(shipped, tuned):
    ship([tuned], shipped)
    records = Records.open(tuned, AVX2)
    records.add(Record(Instance.of(LAYER, AVX2), Blocking(4, 1, 8, 32), (0.7,) * 4, (1e-6,) * 4, settled=True))
    assert ship([tuned], shipped) == {file_name("avx2", cpu_type()): 1}
    assert TunedKnobs(None, [AVX2])(LAYER, AVX2, 1.0) == Blocking(4, 1, 8, 32)


def test_ones_own_records_come_first(shipped, tuned, tmp_path):
    ship([tuned], shipped)
    own = tmp_path / "own"
    own.mkdir()
    Records.open(own, AVX2).add(Record(Instance.of(LAYER, AVX2), Blocking(2, 2, 8, 32), (1,) * 4, settled=True))
    knobs = TunedKnobs(own, [AVX2])
    assert knobs(LAYER, AVX2, 1.0) == Blocking(2, 2, 8, 32)
    assert knobs.notes() == (f"Knobs of 1 of 1 kernels come from records of {cpu_type()}.",)


def test_stale_ones_are_noted_and_not_used(shipped, tuned, monkeypatch):
    ship([tuned], shipped)
    monkeypatch.setattr(module, "kernel_version", lambda _: "another")
    untuned = TunedKnobs(None, [AVX2])
    assert untuned(LAYER, AVX2, 1.0) is None
    assert [n for n in untuned.notes() if "1 were not used: made with other kernel generators" in n] == [
        *untuned.notes()
    ]


def test_a_file_names_the_cpu_to_compile_for(shipped, tmp_path):
    other = "AuthenticAMD family 1 model 1"
    Records.open(tmp_path, AVX2, other).add(Record(Instance.of(LAYER, AVX2), KNOBS, (0.8,) * 4, settled=True))
    path = tmp_path / file_name("avx2", other)
    assert TunedKnobs(tmp_path, [AVX2])(LAYER, AVX2, 1.0) is None
    knobs = TunedKnobs(path, [AVX2])
    assert knobs(LAYER, AVX2, 1.0) == KNOBS and other in knobs.notes()[0]
    with pytest.raises(ValueError, match="no file of records"):
        TunedKnobs(path.rename(tmp_path / "avx2--renamed.jsonl"), [AVX2])


def test_what_ships_is_current():
    """Shows, without failing, what has to be measured again: ``whet tune`` and ``python -m whet.tune.ship``."""
    lines = [line for path in SHIPPED.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert all(json.loads(line)["settled"] for line in lines)
    stale = []
    for path in SHIPPED.glob("*.jsonl"):
        records = Records.open(SHIPPED, ISAS[path.name.partition("--")[0]], module._cpu_of(path))
        stale += records.notes()
    if stale:
        pytest.skip("; ".join(stale))
