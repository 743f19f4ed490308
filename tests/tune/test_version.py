import shutil
from pathlib import Path

import pytest

import whet.schedules
from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.schedules.isa import ISAS
from whet.tune import version
from whet.tune.instance import Instance

VNNI = ISAS["avx512_vnni"]
KERNELS = {
    "dense": Instance.of(DenseSpec(64, 64, "i8"), VNNI),
    "amx": Instance.of(DenseSpec(64, 64, "i8"), ISAS["amx_int8"]),
    "sparse": Instance.of(DenseSpec(64, 64, "i8_sparse"), VNNI, 0.2),
    "attention": Instance.of(AttentionSpec(2, 32, "i8", 64), VNNI),
}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the generators' sources that versions are made of instead."""
    folder = tmp_path / "schedules"
    shutil.copytree(Path(whet.schedules.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("whet.schedules.__file__", str(folder / "__init__.py"))
    version._version.cache_clear()
    yield folder
    version._version.cache_clear()


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("attention_softmax.py", {"attention"}),
        ("sparse_i8.py", {"sparse"}),
        ("dense_amx.py", {"amx"}),
        ("epilogue.py", {"dense", "amx", "sparse"}),
        ("isa.py", set(KERNELS)),
        ("cost.py", set()),
        ("layer_norm.py", set()),
    ],
)
def test_a_change_stales_what_is_made_of_it(copy, file, stale):
    before = {name: version.kernel_version(kernel) for name, kernel in KERNELS.items()}
    with (copy / file).open("a") as source:
        source.write("# changed\n")
    version._version.cache_clear()
    after = {name: version.kernel_version(kernel) for name, kernel in KERNELS.items()}
    assert {name for name in KERNELS if before[name] != after[name]} == stale


def test_kernels_of_one_family_have_one_version():
    other = Instance.of(DenseSpec(128, 32, "i8_sparse", activation="gelu"), VNNI, 0.5)
    assert version.kernel_version(other) == version.kernel_version(KERNELS["sparse"])
