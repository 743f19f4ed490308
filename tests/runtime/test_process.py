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


# Private memory, in KB: pages that no other process has.
PRIVATE = """
def private():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    return sum(int(line[1]) for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A module with 24 MB of weights."""
    path = tmp_path_factory.mktemp("big") / "big.so"
    blob, table = tiny_module.stored({**tiny_module.weights(), "big": np.ones((6 << 20,), np.float32)})
    metadata = replace(tiny_module.METADATA, weights=table)
    tiny_module.write_module([(tiny_module.executable(), metadata)], blob, None, path)
    return path


def test_a_second_process_adds_little(big):
    """Less than a fifth of the file, also after it has read every weight."""
    code = (
        PRIVATE
        + """
import sys
from whet.runtime import load
from whet.runtime.artifact import open_artifact
before = private()
session = load(sys.argv[1], threads=1)
weights = open_artifact(sys.argv[1]).weights()
assert weights[3].sum() == 6 << 20
session.run([list(range(40))])
print(private() - before, flush=True)
sys.stdin.read()
"""
    )
    command = [sys.executable, "-c", code, str(big)]
    first, second = (subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "12")
    try:
        first.stdout.readline()
        # The one that is measured last has the other beside it.
        second.stdout.readline()
        third = subprocess.run(command, input="", capture_output=True, text=True, check=True)
        added = int(third.stdout)
    finally:
        for process in (first, second):
            process.communicate("")
    assert added * 1024 < 0.2 * big.stat().st_size, f"{added} KB"


def test_sessions_share_the_weights_of_a_process(big):
    out = python(
        PRIVATE
        + """
import sys
from whet.runtime import load
def ready():
    session = load(sys.argv[1], threads=1)
    assert session.run([list(range(40))]).shape == (1, 40, 5)
    return session
first = ready()
before = private()
sessions = [ready() for _ in range(10)]
print(private() - before)
""",
        big,
    )
    assert int(out) < 3000, f"{out} KB for 10 sessions of a file of 24 MB"


def test_default_threads_are_the_cpus_of_the_process(modules):
    out = python(
        """
import os, sys
from whet.runtime import load
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
session = load(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
session.run([list(range(40))])
print(session.threads, len(os.listdir("/proc/self/task")) - before)
""",
        modules["token"],
    )
    assert out == "1 0\n"


def test_workers_run_where_the_process_may(modules):
    """Pinned workers of processes that share a machine would all fight for the first cores."""
    out = python(
        """
import os, sys
from whet.runtime import load
os.sched_setaffinity(0, range(os.cpu_count()))
allowed = os.sched_getaffinity(0)
session = load(sys.argv[1], 3)
before = set(os.listdir("/proc/self/task"))
session.run([list(range(40))])
workers = set(os.listdir("/proc/self/task")) - before
print(len(allowed), len(workers), all(os.sched_getaffinity(int(w)) == allowed for w in workers))
""",
        modules["token"],
    )
    cpus, *rest = out.split()
    if cpus == "1":
        pytest.skip("one CPU: a pinned thread has the same affinity as any other")
    assert rest == ["2", "True"]


def test_workers_end_with_the_thread_that_called(modules):
    out = python(
        """
import os, sys, threading, time
from whet.runtime import load
session = load(sys.argv[1], 3)
before = len(os.listdir("/proc/self/task"))
most = 0
def work():
    global most
    session.run([list(range(40))])
    most = max(most, len(os.listdir("/proc/self/task")) - before)
for _ in range(20):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
end = time.monotonic() + 20
while len(os.listdir("/proc/self/task")) > before and time.monotonic() < end:
    time.sleep(0.05)
print(most >= 3, len(os.listdir("/proc/self/task")) - before)
""",
        modules["token"],
    )
    assert out == "True 0\n"


def test_weights_are_pages_of_the_file_in_memory(big):
    """They are counted as file-backed pages, not as anonymous ones, also after they were read."""
    out = python(
        """
import sys
from whet.runtime.artifact import open_artifact
weights = open_artifact(sys.argv[1]).weights()
assert weights[3].sum() == 6 << 20
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
        big,
    )
    resident, anonymous = map(int, out.split())
    assert resident >= 24 << 10
    assert anonymous == 0
