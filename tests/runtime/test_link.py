"""Writing the file: complete or not at all."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_module

import whet.link
from whet.link import find_compiler, write_module
from whet.runtime.artifact import open_artifact

HERE = str(Path(__file__).parent)
WRITE = f"import sys; sys.path.insert(0, {HERE!r}); import tiny_module; tiny_module.write(sys.argv[1])"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_symbols(modules):
    """What a C program finds with dlsym."""
    library = ctypes.CDLL(str(modules["embedding"]), ctypes.RTLD_LOCAL)
    metadata = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(library, "whet_metadata"))).value
    assert len(metadata) == ctypes.c_uint64.in_dll(library, "whet_metadata_size").value
    table = json.loads(metadata)["weights"]
    address = ctypes.addressof(ctypes.c_char.in_dll(library, "whet_weights"))
    assert address % 4096 == 0
    word = np.ctypeslib.as_array((ctypes.c_float * 250).from_address(address + table[0]["offset"]))
    np.testing.assert_array_equal(word.reshape(50, 5), tiny_module.weights()["word"])
    last = table[-1]["offset"] + 2 * 5 * 4
    assert last <= ctypes.c_uint64.in_dll(library, "whet_weights_size").value < last + 64
    assert ctypes.c_uint64.in_dll(library, "whet_tokenizer_size").value > 100


def test_dtypes_and_empty_weights(tmp_path):
    arrays = {
        "int8": np.arange(-5, 5, dtype=np.int8).reshape(2, 5),
        "empty": np.empty((0, 7), np.float32),
        "uint8": np.arange(3, dtype=np.uint8),
        "float16": np.ones((2, 2), np.float16),
        "int32": np.arange(4, dtype=np.int32)[::2],
        "scalar": np.float32(3.5).reshape(()),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    path = tmp_path / "m.so"
    blob, table = tiny_module.stored(arrays)
    metadata = replace(tiny_module.METADATA, weights=table)
    write_module([(tiny_module.executable(), metadata)], blob, None, path)
    opened = open_artifact(path)
    assert opened.variants == (metadata,)
    for array, expected, row in zip(opened.weights(), arrays.values(), metadata.weights, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
        assert row.offset % 64 == 0


def test_the_same_bytes_stand_once():
    same = np.arange(100, dtype=np.float32)
    blob, table = tiny_module.stored({"a": same, "b": same[::-1], "c": same.copy(), "d": same.view(np.int32)})
    assert [weight.offset for weight in table] == [0, 448, 0, 0]
    assert len(b"".join(blob.pieces())) == 448 + 448


def test_helpers_are_those_that_every_cpu_runs(tmp_path, monkeypatch):
    """LLVM adds the same helpers to each variant; of these weak symbols linkers take the first."""
    order = []
    link = whet.link._link
    monkeypatch.setattr(whet.link, "_link", lambda *args: (order.extend(args[-1]), link(*args)))
    changes = [{"isa": name, "entry": f"main_{name}"} for name in ("fast", "portable")]
    tiny_module.write_variants(tmp_path / "m.so", changes)
    assert [Path(path).parent.name for path in order] == ["1", "0"]


def test_nothing_but_the_module_is_left(modules):
    assert all(name.endswith(".so") for name in names(modules["token"].parent))


def test_failing_linker_leaves_the_old_file(tmp_path, monkeypatch):
    path = tiny_module.write(tmp_path / "m.so")
    before = path.read_bytes()
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(RuntimeError, match=r"linking failed with status 3: .*\nit broke"):
        tiny_module.write(path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["broken", "m.so"]


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no C compiler found \(looked for cc, gcc, clang\).*apt-get install gcc"
    ):
        find_compiler()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="looked for no-such-compiler"):
        find_compiler()


def test_output_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist; create it"):
        tiny_module.write(tmp_path / "nowhere" / "m.so")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        tiny_module.write(tmp_path)


def test_paths_with_blanks_and_quotes(tmp_path):
    folder = tmp_path / "a b'\"$é"
    folder.mkdir()
    open_artifact(tiny_module.write(folder / "m o.so"))


@pytest.mark.parametrize(("limit", "reserve"), [(500, 0), (3000, 1 << 20), (30000, 1 << 20)])
def test_no_room(tmp_path, limit, reserve):
    """A file size limit stands in for a full disk: the blob hits it, or the check before LLVM writes."""
    code = f"""
import resource, sys
sys.path.insert(0, {HERE!r})
import tiny_module, whet.link
whet.link._CODE_ROOM = {reserve}
executable = tiny_module.executable()
blob, _ = tiny_module.stored(tiny_module.weights())
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    tiny_module.write_module([(executable, tiny_module.METADATA)], blob, None, sys.argv[1])
except OSError as error:
    print(error.errno, error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.so"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(errno.EFBIG)), done.stdout + done.stderr
    assert "no room to write" in done.stdout
    assert names(tmp_path) == []


def test_no_room_for_the_linker(tmp_path, monkeypatch):
    compiler = tmp_path / "limited"
    compiler.write_text(f'#!/bin/sh\nulimit -f 20\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match="no room to write"):
        tiny_module.write(tmp_path / "m.so")
    assert names(tmp_path) == ["limited"]


@pytest.mark.parametrize("kilobytes", [8, 24, 48, 64])
def test_disk_full(tmp_path, kilobytes):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OSError, match="no room to write") as caught:
            tiny_module.write(tmp_path / "m.so")
        assert caught.value.errno == errno.ENOSPC
        assert names(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_interrupt_leaves_the_old_file(tmp_path):
    path = tiny_module.write(tmp_path / "m.so")
    before = path.read_bytes()
    started = tmp_path / "started"
    compiler = tmp_path / "slow"
    compiler.write_text(f"#!/bin/sh\ntouch '{started}'\nexec sleep 20\n")
    compiler.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, path], env={**os.environ, "CC": str(compiler)}, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    while not started.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=10)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert path.read_bytes() == before
    assert names(tmp_path) == ["m.so", "slow", "started"]
