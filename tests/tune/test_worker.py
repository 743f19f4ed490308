"""What a worker does with kernels that fail; test_tracker.py has the rest of it."""

import os
import signal
import time

import pytest

from whet.tune.worker import _in_process, address


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def refuse():
    raise ValueError("other generators")


def test_times_come_back():
    assert _in_process(lambda: [1.0, 2.0], 10) == {"times": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("work", "error"),
    [(crash, "exit code -11"), (refuse, "ValueError: other generators"), (lambda: time.sleep(60), "more than")],
)
def test_failures_are_told_apart(work, error):
    start = time.monotonic()
    assert error in _in_process(work, 1.0)["error"]
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("text", ["9190", "host", "host:", ":9190", "host:port"])
def test_addresses_need_host_and_port(text):
    with pytest.raises(ValueError, match="host:port"):
        address(text)
    assert address("::1:9190") == ("::1", 9190)
