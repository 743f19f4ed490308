"""Finding libtvm_runtime.so."""

import shutil
import subprocess
import sys

import pytest

from whet.runtime import ArtifactError, library


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)


def test_order(tmp_path, monkeypatch):
    beside = tmp_path / library.NAME
    beside.touch()
    assert library.find_runtime(tmp_path).parts[-3:] == ("tvm", "lib", library.NAME)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert library.find_runtime(tmp_path) == beside.resolve()
    named = tmp_path / "named.so"
    monkeypatch.setenv(library.VARIABLE, str(named))
    with pytest.raises(ArtifactError, match="which is no file"):
        library.find_runtime(tmp_path)
    named.touch()
    assert library.find_runtime(tmp_path) == named


def test_there_is_only_one_in_a_process(modules, tmp_path):
    """A second copy would end the process; here one is named, one installed, and one beside each module."""
    installed = library.find_runtime(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(modules["token"], folder / "m.so")
        shutil.copy(installed, folder)
    code = """
import os, sys
from whet.runtime import load
for path in sys.argv[1:]:
    print(load(path).run([[1, 2, 3]]).shape)
    os.environ["WHET_TVM_RUNTIME"] = os.path.dirname(path) + "/libtvm_runtime.so"
import tvm
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *(f / "m.so" for f in folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3, 5)"] * 2


def test_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ArtifactError, match=r"libtvm_runtime\.so is neither in .*pip install apache-tvm"):
        library.find_runtime(tmp_path)


def test_not_a_library(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_loaded", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / library.NAME).write_text("no library")
    with pytest.raises(ArtifactError, match="does not load"):
        library.load_runtime(tmp_path)


def test_beside_the_module(modules, tmp_path):
    """Deployment by copying two files, where no apache-tvm is installed."""
    runtime = library.find_runtime(tmp_path)
    (tmp_path / "m.so").write_bytes(modules["token"].read_bytes())
    (tmp_path / library.NAME).write_bytes(runtime.read_bytes())
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "tvm" else find(name)
from whet.runtime import load
print(load(sys.argv[1]).run([[1, 2, 3]]).shape, "tvm" in sys.modules)
print([line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime" in line][0])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.so"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["(1, 3, 5) False", str(tmp_path / library.NAME)], done.stderr
