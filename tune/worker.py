"""A server of TVM's RPC that times kernels for others: what ``whet tune worker`` runs.

TVM's own server does the work: it joins a tracker, and forks a process for each session. This file adds the two
functions that a tuning job calls, and starts a new listener when TVM's has ended: it does so when a session's process
crashes, and when the tracker is gone for a minute.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.rpc.server import PopenRPCServerState

from whet.tune.machine import Machine
from whet.tune.measure import evaluate, start_worker

DESCRIBE, EVALUATE = "whet.tune.describe", "whet.tune.evaluate"
"""Names of the functions in a session."""
FIRST_PORT, LAST_PORT = 9090, 9199


def address(text: str) -> tuple[str, int]:
    """Read ``host:port``. ValueError if it is anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"the tracker is {text!r}; expected host:port, as in 192.168.1.4:9190")
    return host, int(port)


def serve(tracker: tuple[str, int], key: str, host: str = "0.0.0.0") -> None:
    """Serve tuning jobs that ask the tracker for ``key``, until an interrupt ends the process.

    Whoever reaches the port can run code here, as with any server of TVM's RPC.
    """
    multiprocessing.set_start_method("fork", force=True)  # the processes of sessions inherit the functions
    start_worker()
    tvm_ffi.register_global_func(DESCRIBE, lambda: Machine.here().to_json(), override=True)
    tvm_ffi.register_global_func(EVALUATE, _evaluate, override=True)
    home = Path.cwd()
    try:
        while True:
            os.chdir(home)  # TVM's server works in the folder of the session, which is gone with one that crashed
            server = PopenRPCServerState(host, FIRST_PORT, LAST_PORT + 1, tracker_addr=tracker, key=key)
            server.thread.join()
            server.sock.close()
    except KeyboardInterrupt:
        os._exit(130)  # TVM's listener does not end


def _evaluate(name: str, cpu: str, seconds: float) -> str:
    """Time a module that was uploaded, on a ``cpu`` of that type; JSON with the ``times`` or the ``error``."""
    here = Machine.here().cpu
    if here != cpu:
        return json.dumps({"stranger": here})
    path = tvm_ffi.get_global_func("tvm.rpc.server.workpath")(name)
    return json.dumps(_in_process(lambda: _measure(str(path)), seconds))


def _measure(path: str) -> list[float]:
    start_worker()
    return evaluate(tvm.runtime.load_module(path), None, None, None)


def _in_process(work: Callable[[], list[float]], seconds: float) -> dict[str, Any]:
    """Do work in a process of its own: a kernel that crashes must not take the session with it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(work, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"error": f"it took more than {seconds:.0f} s"}
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return result


def _send(work: Callable[[], list[float]], sender: Connection) -> None:
    try:
        result: dict[str, Any] = {"times": work()}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    sender.send(result)
