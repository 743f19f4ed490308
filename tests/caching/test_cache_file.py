"""The freeze file: what is written is read; what is damaged, foreign or stale is refused by name."""

import json

import numpy as np
import pytest

from whet.caching.cache import Cache
from whet.caching.file import Freeze, FreezeError, load, save


def example():
    rng = np.random.default_rng(0)

    def floats(*shape):
        return rng.normal(size=shape).astype("float32")

    def ints(*shape):
        return rng.integers(-127, 128, shape).astype("int8")

    perceptron = (floats(8), floats(8), ints(4, 8), floats(4), floats(4), ints(3, 4), floats(3), floats(3))
    clusters = (floats(8), floats(8), ints(5, 8), floats(5), floats(5), ints(5, 3), floats(5), floats(5))
    caches = (Cache(0, "perceptron", perceptron, 0.6), Cache(3, "clusters", clusters, 0.0))
    return Freeze("bank", "ab12", "int8", 4, 0.02, 0.005, (0.7, 0.2, 0.1), caches, {"accuracy": 0.9})


@pytest.fixture
def path(tmp_path):
    save(example(), tmp_path / "a.freeze")
    return tmp_path / "a.freeze"


def test_round_trip(path):
    found, wanted = load(path), example()
    assert (found.model, found.weights, found.precision, found.fitted) == ("bank", "ab12", "int8", {"accuracy": 0.9})
    assert (found.layers, found.allowed_loss, found.budget, found.leave) == (4, 0.02, 0.005, (0.7, 0.2, 0.1))
    for a, b in zip(found.caches, wanted.caches, strict=True):
        assert (a.layer, a.kind, a.threshold) == (b.layer, b.kind, b.threshold)
        for x, y in zip(a.arrays, b.arrays, strict=True):
            np.testing.assert_array_equal(x, y)
    assert [p.name for p in path.parent.iterdir()] == ["a.freeze"]


def test_no_caches(tmp_path):
    save(Freeze("bank", "ab12", "int8", 4, 0.02, 0.005, (), (), {}), tmp_path / "none.freeze")
    assert load(tmp_path / "none.freeze").caches == ()


def test_every_damaged_byte_of_the_weights_is_seen(path):
    whole = path.read_bytes()
    start = whole.index(example().caches[1].arrays[2].tobytes())
    for position in (start, start + 30):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(FreezeError, match=r"a.freeze is damaged"):
            load(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing of the kind", None])
def test_other_files_are_refused(path, content):
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(FreezeError, match=r"a.freeze is damaged or no freeze file"):
        load(path)


def test_an_archive_of_something_else_is_refused(path):
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(b'{"kind": "other"}', "uint8"))
    with pytest.raises(FreezeError, match="is no freeze file"):
        load(path)


def test_another_version_is_refused(path):
    with np.load(path) as archive:
        parts = dict(archive)
    header = json.loads(parts["header"].tobytes()) | {"format": 1}
    parts["header"] = np.frombuffer(json.dumps(header).encode(), "uint8")
    with path.open("wb") as file:
        np.savez(file, **parts)
    with pytest.raises(FreezeError, match="has format 1, this whet reads format 5"):
        load(path)


def test_arrays_that_do_not_fit_together_are_refused(path):
    with np.load(path) as archive:
        parts = dict(archive)
    for name, array in (("0.scale", np.zeros(9, "float32")), ("1.answers", np.zeros((5, 3), "float32"))):
        with path.open("wb") as file:
            np.savez(file, **{**parts, name: array})
        with pytest.raises(FreezeError, match=f"is malformed .{name[2:]} of a cache is float32"):
            load(path)
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in parts.items() if name != "1.answers"})
    with pytest.raises(FreezeError, match="is malformed"):
        load(path)


def test_a_missing_file_is_just_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.freeze")


def test_check():
    example().check("a.freeze", "ab12", "int8")
    with pytest.raises(FreezeError, match="for the model bank with other weights"):
        example().check("a.freeze", "ffff", "int8")
    with pytest.raises(FreezeError, match="fitted to int8, the precision is fp32"):
        example().check("a.freeze", "ab12", "fp32")
