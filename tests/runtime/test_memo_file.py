"""The file of records: what was added is read back, nothing else is believed."""

import ctypes
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from whet.runtime.memo_file import Description, MemoError, MemoFile, create, describe
from whet.runtime.metadata import Records

RECORDS = Records("0" * 64, 2, 3, 8)
DESCRIPTION = Description(
    "model", RECORDS, 50, 100, 1 << 20, {"default": 0.1}, {"default": "words"}, {"default": [[1, 64]]}, {}
)


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, 50, (2, length)).astype(np.int32)


def attention(seed, length):
    return np.random.default_rng(seed).integers(0, 256, RECORDS.size(length)).astype(np.uint8)


def view(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def add(file, seed, length):
    view(file.room(length), RECORDS.size(length))[:] = attention(seed, length)
    file.add(tokens(seed, length), np.full((2, 8), [[seed], [-seed]], np.float32))


@pytest.fixture
def path(tmp_path):
    create(tmp_path / "a.memo", DESCRIPTION, np.arange(800, dtype=np.float32).reshape(2, 50, 8))
    return tmp_path / "a.memo"


LENGTHS = [5, 16, 33, 1]


def fill(path):
    file = MemoFile(path, writable=True)
    for i, length in enumerate(LENGTHS):
        add(file, i, length)
    return file


@pytest.fixture
def filled(path):
    fill(path)
    return path


def test_what_was_added_is_there(filled):
    file = MemoFile(filled)
    assert (file.count, file.description) == (len(LENGTHS), DESCRIPTION)
    np.testing.assert_array_equal(file.vectors.reshape(-1), np.arange(800))
    for i, length in enumerate(LENGTHS):
        assert file.address(i) % 64 == 0
        np.testing.assert_array_equal(file.tokens(i), tokens(i, length))
        np.testing.assert_array_equal(view(file.address(i), RECORDS.size(length)), attention(i, length))
        np.testing.assert_array_equal(file.attention(i), attention(i, length))
        assert (file.keys[0, i] == i).all() and (file.keys[1, i] == -i).all()
    file.verify()


def test_a_description_can_be_written_again(filled):
    other = replace(DESCRIPTION, levels={"default": 0.5}, report={"name": "ä"})
    describe(filled, other)
    assert MemoFile(filled).description == other
    assert MemoFile(filled).count == len(LENGTHS)


def test_a_full_file_has_no_room(path):
    file = MemoFile(path, writable=True)
    while file.room(64) is not None:
        add(file, file.count, 64)
    assert 0 < file.count < 100
    assert MemoFile(path).count == file.count


def test_readers_see_what_another_adds(path):
    reader, writer = MemoFile(path), MemoFile(path, writable=True)
    add(writer, 7, 20)
    assert reader.count == 1
    np.testing.assert_array_equal(view(reader.address(0), RECORDS.size(20)), attention(7, 20))
    with pytest.raises(MemoError, match="another process adds"):
        MemoFile(path, writable=True)


def test_a_thinned_file_takes_the_place_of_the_other(path):
    writer, reader = fill(path), MemoFile(path)
    thin = writer.thinned([0, 2])
    assert reader.replaced and not thin.replaced
    for file in (thin, MemoFile(path)):
        assert (file.count, file.description) == (2, DESCRIPTION)
        file.verify()
        for new, old in enumerate((0, 2)):
            np.testing.assert_array_equal(file.tokens(new), tokens(old, LENGTHS[old]))
            found = view(file.address(new), RECORDS.size(LENGTHS[old]))
            np.testing.assert_array_equal(found, attention(old, LENGTHS[old]))
            assert (file.keys[0, new] == old).all() and (file.keys[1, new] == -old).all()
    np.testing.assert_array_equal(reader.tokens(3), tokens(3, LENGTHS[3]))  # who had it open reads on
    reader.verify()
    with pytest.raises(MemoError, match="another process adds"):
        MemoFile(path, writable=True)
    add(thin, 9, 20)
    MemoFile(path).verify()


def test_a_file_that_was_built_again_is_not_thinned(path):
    file = fill(path)
    path.unlink()
    create(path, DESCRIPTION, np.zeros((50, 8), np.float32))
    with pytest.raises(MemoError, match="another file by now"):
        file.thinned([0])
    assert MemoFile(path).count == 0


KILLED_THINNING = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_memo_file import MemoFile, fill
file = fill(sys.argv[1])
MemoFile.flush = lambda file: os.kill(os.getpid(), 9)
file.thinned([1, 3])
"""


def test_a_kill_while_records_leave_leaves_the_file(path):
    killed = subprocess.run([sys.executable, "-c", KILLED_THINNING, path, Path(__file__).parent], check=False)
    assert killed.returncode == -signal.SIGKILL
    file = MemoFile(path, writable=True)
    assert file.count == len(LENGTHS)
    file.verify()
    assert file.thinned([1, 3]).count == 2  # what was left lying is no obstacle
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from test_memo_file import MemoFile, add
file = MemoFile(sys.argv[1], writable=True)
while True:
    add(file, file.count, 1 + file.count % 30)
    print(file.count, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    path = tmp_path / "a.memo"
    create(path, replace(DESCRIPTION, capacity=10**5, size=1 << 28), np.zeros((50, 8), np.float32))
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, Path(__file__).parent], stdout=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if int(line) >= 40:
            break
    child.send_signal(signal.SIGKILL)
    acknowledged = int((child.stdout.read().split() or ["40"])[-1])
    child.wait()
    file = MemoFile(path, writable=True)
    assert acknowledged <= file.count <= acknowledged + 1
    file.verify()
    for i in range(file.count):
        np.testing.assert_array_equal(file.tokens(i), tokens(i, 1 + i % 30))
    add(file, 0, 9)  # and it goes on
    file.verify()


def changed(path, offset, value):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


def test_damage_is_refused(filled, tmp_path):
    original = filled.read_bytes()
    d = DESCRIPTION
    for offset, value, message in (
        (0, b"X", "no memo file"),
        (8, b"\x09", "format 9"),
        (80, b"~", "description differs"),
        (56, b"\xff", "list of records"),
        (d.entries + 8, b"\x40", "list of records"),
        (d.entries + 12, b"\x77", "list of records"),
    ):
        filled.write_bytes(original)
        changed(filled, offset, value)
        with pytest.raises(MemoError, match=message):
            MemoFile(filled)
    for size in (0, 100, 20_000, len(original) - 1):
        filled.write_bytes(original[:size])
        with pytest.raises(MemoError, match="cut off"):
            MemoFile(filled)
    filled.write_bytes(original)
    changed(filled, d.first_record + 3, b"\x00\x01")
    with pytest.raises(MemoError, match="record 0 differs"):
        MemoFile(filled).verify()
    with pytest.raises(FileNotFoundError):
        MemoFile(tmp_path / "none.memo")
