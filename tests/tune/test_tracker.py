"""A job over TVM's own tracker, with workers on this machine, of which one dies and one hangs."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from laboratory import ISAS, Instance

from whet import cli
from whet.progress import Silent
from whet.runtime.cpu import cpu_flags
from whet.schedules.dense import DenseSpec
from whet.tune.machine import Machine, cpu_type
from whet.tune.records import Records
from whet.tune.search import tune
from whet.tune.worker import address

AVX2 = ISAS["avx2"]
KEY = "here"
TIMEOUT, GRACE = 5.0, 5.0
"""Seconds; a worker that hangs costs their sum."""

pytest.importorskip("tornado", reason="tornado is not installed, which TVM's tracker needs: pip install '.[tune]'")
needs_avx2 = pytest.mark.skipif(not cpu_flags().issuperset(AVX2.cpu_flags), reason="this CPU lacks AVX2")


def free_port():
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this sandbox has no sockets: {error}")


def start(*command):
    """Start a process whose children end with its group."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *command], start_new_session=True, **quiet)


@pytest.fixture(scope="module")
def tracker():
    port = free_port()
    process = start("-m", "tvm.exec.rpc_tracker", "--host=127.0.0.1", f"--port={port}", f"--port-end={port + 1}")
    yield f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)


def start_worker(tracker, key):
    command = f"from whet.cli import main; main(['tune', 'worker', '--tracker={tracker}', '--key={key}'])"
    return start("-c", command)


@pytest.fixture
def workers(tracker):
    processes = [start_worker(tracker, KEY) for _ in range(3)]
    yield processes
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)


def when_ready(tracker, key, count):
    from whet.tune.remote import count_workers  # noqa: PLC0415 -- needs packages that are asked for above

    deadline = time.monotonic() + 120
    found = None
    while found != count:
        assert time.monotonic() < deadline, found
        try:
            found = count_workers(address(tracker), key)
        except (ConnectionError, ValueError) as error:
            found = error
        time.sleep(0.2)


class Saboteur(Silent):
    """Kills one worker and stops another when a few trials are done."""

    def __init__(self, workers):
        self.workers = workers
        self.at = None

    def tasks(self, *args):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def task(self, index, done, what):
        pass

    def all(self, done, what):
        if self.at is None and done >= 3:
            self.at = done
            os.killpg(self.workers[0].pid, signal.SIGKILL)
            os.killpg(self.workers[1].pid, signal.SIGSTOP)


@needs_avx2
def test_a_job_survives_workers_that_die_and_hang(tracker, workers, tmp_path):
    from whet.tune import remote  # noqa: PLC0415

    when_ready(tracker, KEY, 3)
    laboratory, machine = remote.laboratory(address(tracker), KEY, TIMEOUT, GRACE)
    assert machine == Machine.here()
    instances = {Instance.of(DenseSpec(64, 32, "i8", residual=r), AVX2): 1 for r in (False, True)}
    records = Records.open(tmp_path, AVX2, machine.cpu)
    saboteur = Saboteur(workers)
    found = tune(instances, records, saboteur, trials=16, laboratory=laboratory)
    assert 3 <= saboteur.at < 16
    assert set(found) == set(instances) and all(verdict.settled for verdict in found.values())
    again = Records.open(tmp_path, AVX2)
    assert sum(len(again.measured(i)) for i in instances) == 16 and not again.skipped
    assert all(len(r.ratios) == 4 and min(r.seconds) > 0 and not r.error for r in again.records)


def test_a_worker_survives_a_session_that_crashes(tracker):
    from tvm import rpc  # noqa: PLC0415

    from whet.tune.worker import DESCRIBE  # noqa: PLC0415

    psutil = pytest.importorskip("psutil", reason="psutil is not installed: pip install '.[tune]'")
    process = start_worker(tracker, "crash")
    try:
        when_ready(tracker, "crash", 1)
        client = rpc.connect_tracker(*address(tracker))
        session = client.request("crash")
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        with pytest.raises(Exception, match=r"[Ss]ocket|RPC|closed|reset|length"):
            session.get_function(DESCRIBE)()
        again = client.request("crash", session_timeout=30)  # waits until the worker is back
        assert Machine.from_json(str(again.get_function(DESCRIBE)())) == Machine.here()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_no_tracker_is_an_error(tmp_path, capsys):
    model = str(tmp_path)
    command = ["tune", model, "--records", str(tmp_path), "--trials", "1"]
    assert cli.main([*command, "--tracker", f"127.0.0.1:{free_port()}", "--key", KEY]) == 1
    assert "no tracker" in capsys.readouterr().err
    assert cli.main([*command, "--tracker", "nowhere", "--key", KEY]) == 1
    assert "host:port" in capsys.readouterr().err
    assert cli.main([*command, "--key", KEY]) == 1
    assert "expected both" in capsys.readouterr().err


def test_a_key_without_workers_is_an_error(tracker):
    from whet.tune.remote import count_workers  # noqa: PLC0415

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            count_workers(address(tracker), "other")
        except ConnectionError:
            time.sleep(0.2)
        except ValueError as error:
            assert "no worker of key 'other'" in str(error)
            return
    pytest.fail("the tracker did not start")


def test_workers_are_asked_what_they_are():
    here = Machine.here()
    assert Machine.from_json(here.to_json()) == here
    assert cpu_type().startswith(here.cpu) and "family" in here.cpu
    less = Machine(here.cpu, here.name, tuple(f for f in here.flags if f != "avx2"), here.amx)
    assert "lacks avx2" in less.why_not(AVX2)
    with pytest.raises(ValueError, match="none of"):
        Machine(here.cpu, here.name, (), "").best_isa()
