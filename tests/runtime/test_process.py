"""What a process sees that only loads and runs: imports, time, forks, pools, memory."""

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_module


def python(code: str, *arguments: object, timeout: float = 30) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_the_compiler_is_imported(modules):
    """Time is printed, not judged: the machine may be busy."""
    start = time.perf_counter()
    out = python(
        """
import sys
from whet.runtime import load
session = load(sys.argv[1])
print(session.encode(["the cat runs", ""]).shape)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"tvm", "torch", "transformers", "onnx", "scipy"}))
""",
        modules["embedding"],
    )
    print(f"\nfrom process start to exit with first embedding: {time.perf_counter() - start:.2f} s")
    assert out.splitlines() == ["(2, 5)", "[]"]


def test_torch_is_not_imported_where_it_is_installed(modules, tmp_path):
    (tmp_path / "torch.py").write_text("Tensor = object\n__version__ = '2.9.0'\n")
    out = python(
        """
import sys
sys.path.insert(0, sys.argv[2])
from whet.runtime import load
print(load(sys.argv[1]).run([[1]]).shape, "torch" in sys.modules)
import torch
print(torch.__version__)
""",
        modules["token"],
        tmp_path,
    )
    assert out.splitlines() == ["(1, 1, 5) False", "2.9.0"]


def test_token_ids_need_no_tokenizers(modules):
    code = "import sys; from whet.runtime import load; load(sys.argv[1]).run([[1]]); print('tokenizers' in sys.modules)"
    assert python(code, modules["embedding"]) == "False\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_fork(modules, threads):
    """The pool's workers do not survive a fork; the child gets new ones."""
    out = python(
        """
import os, sys
from whet.runtime import load
session = load(sys.argv[1], int(sys.argv[2]))
ids = [list(range(40))] * 3
expected = session.run(ids)
child = os.fork()
if child == 0:
    same = [(session.run(ids) == expected).all() for _ in range(3)]
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if (session.run(ids) == expected).all() else 1)
    os._exit(os.waitpid(grandchild, 0)[1] or (0 if all(same) else 1))
print(os.waitpid(child, 0)[1], (session.run(ids) == expected).all())
""",
        modules["token"],
        threads,
    )
    assert out == "0 True\n"


def test_fork_that_ends_normally(modules):
    out = python(
        """
import multiprocessing, sys
from whet.runtime import load
session = load(sys.argv[1], 2)
session.run([[1, 2]])
def work(i):
    return float(session.run([[i, i]]).sum())
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(work, range(4)) == [work(i) for i in range(4)])
""",
        modules["token"],
    )
    assert out == "True\n"


def test_tvm_imported_later_or_earlier(modules):
    for first, second in (
        ("import tvm", "session = load(sys.argv[1], 3)"),
        ("session = load(sys.argv[1], 3)", "import tvm"),
    ):
        out = python(
            f"import sys; from whet.runtime import load\n{first}\n{second}\nprint(session.run([[1, 2]]).shape)",
            modules["token"],
        )
        assert out == "(1, 2, 5)\n"


def test_memory_does_not_grow(modules):
    out = python(
        """
import resource, sys
import numpy as np
from whet.runtime import load
session = load(sys.argv[1], 2)
def rounds(n):
    for i in range(n):
        session.run(np.zeros((1 + i % 7, 1 + i % 60), int))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = rounds(2000)
print(rounds(8000) - before)
""",
        modules["token"],
    )
    assert int(out) < 2000, f"grew by {out} KB in 8000 calls"


def test_processes_share_the_weights(tmp_path):
    """Eight megabytes of weights are counted as shared, file-backed pages, also after they were read."""
    path = tmp_path / "big.so"
    big = np.ones((2 << 20,), np.float32)
    blob, table = tiny_module.stored({**tiny_module.weights(), "big": big})
    metadata = replace(tiny_module.METADATA, weights=table)
    tiny_module.write_module([(tiny_module.executable(), metadata)], blob, None, path)
    out = python(
        """
import sys
from whet.runtime.artifact import open_artifact
weights = open_artifact(sys.argv[1]).weights()
assert weights[3].sum() == 2 << 20
sizes = {}
block = False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        block = line.rstrip().endswith("big.so")
    elif block:
        name, value = line.split()[:2]
        sizes[name] = sizes.get(name, 0) + int(value) if value.isdigit() else 0
print(sizes["Rss:"], sizes["Anonymous:"])
""",
        path,
    )
    resident, anonymous = map(int, out.split())
    assert resident >= 8192
    assert anonymous == 0
