"""The deployment examples do what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_module

from whet.runtime import load
from whet.runtime.library import find_runtime

EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = [2, 8, 10, 3] * 5


def run(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def test_python(modules):
    texts = ["the cat runs", "", "a dog"]
    done = run(sys.executable, EXAMPLES / "deploy.py", modules["embedding"], "--threads=1", input="\n".join(texts))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts
    expected = load(modules["embedding"], 1).encode(texts)
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)


def test_python_says_what_is_wrong(modules, tmp_path):
    for path, message in ((tmp_path / "none.so", "is missing"), (modules["token"], "use run()")):
        done = run(sys.executable, EXAMPLES / "deploy.py", path, input="text\n")
        assert done.returncode == 1
        assert done.stderr.startswith("deploy.py: ")
        assert message in done.stderr


@pytest.fixture(scope="module")
def deploy(tmp_path_factory):
    if not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("no g++ or no make")
    folder = tmp_path_factory.mktemp("deploy")
    for name in ("deploy.cpp", "Makefile"):
        shutil.copy(EXAMPLES / name, folder)
    done = run("make", "-C", folder, f"PYTHON={sys.executable}", "CXX=g++ -Wall -Wextra", "deploy")
    assert done.returncode == 0, done.stderr
    return folder / "deploy"


@pytest.mark.parametrize("module", ["token", "request", "variants"])
def test_cpp(deploy, modules, module):
    done = run(deploy, modules[module], find_runtime(EXAMPLES), *IDS)
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
    np.testing.assert_allclose(rows, load(modules[module], 1).run([IDS]).reshape(rows.shape), rtol=1e-6)


def test_cpp_checks(deploy, modules, tmp_path):
    runtime = find_runtime(EXAMPLES)
    other = tiny_module.write(tmp_path / "m.so", cpu_flags=("avx1024",))
    for arguments, message in (
        ((modules["token"], runtime, 50), "50 is not in the vocabulary"),
        ((modules["token"], runtime, -1), "-1 is not in the vocabulary"),
        ((modules["token"], runtime, *[1] * 65), "too many tokens"),
        ((modules["token"], runtime, "1x"), "1x is not a token id"),
        ((modules["padded"], runtime, 1), "only packed modules"),
        ((other, runtime, 1), "avx2: this CPU lacks avx1024; compile"),
        ((runtime, runtime, 1), "not a Whet module"),
        ((tmp_path / "none.so", runtime, 1), "cannot open shared object file"),
    ):
        done = run(deploy, *arguments, env={**os.environ, "LC_ALL": "C"})
        assert done.returncode == 1
        assert message in done.stderr
    assert run(deploy).returncode == 2
