"""Timing on other machines: MetaSchedule's RPC runner, with the workers of a tracker's key.

What is the candidate's fault, and what the worker's, must not be confused: a candidate that fails is never tried
again, while one whose worker died or hung is, on another.
"""

from __future__ import annotations

import json
import socket
from functools import partial
from typing import Any

from tvm import rpc
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from whet.tune.laboratory import CANDIDATE, TIMEOUT_SECONDS, Laboratory, local_builder
from whet.tune.machine import Machine
from whet.tune.measure import allocate_nothing
from whet.tune.worker import DESCRIBE, EVALUATE

CONNECT_SECONDS = 10.0
GRACE_SECONDS = 30.0
"""What a trial may take beyond its timing: to wait for a worker, to connect, and to send."""


def laboratory(
    tracker: tuple[str, int], key: str, timeout: float = TIMEOUT_SECONDS, grace: float = GRACE_SECONDS
) -> tuple[Laboratory, Machine]:
    """Return a laboratory that builds here and times on the tracker's workers of ``key``, and what those are.

    Timing an experiment may take ``timeout`` seconds; a worker that does not answer ``grace`` later is given up.

    Raises:
        ConnectionError: there is no tracker.
        ValueError: it has no worker of that key, or none that answers.

    """
    count = count_workers(tracker, key)
    config = ms.runner.RPCConfig(*tracker, key, session_timeout_sec=int(timeout + grace))
    pool = PopenPoolExecutor(max_workers=count, timeout=timeout + grace)
    machine = _describe(config, pool)
    runner = ms.runner.RPCRunner(
        rpc_config=config,
        f_upload_module=_upload,
        f_alloc_argument=_allocate_nothing,
        f_run_evaluator=partial(_evaluate, machine.cpu, timeout),
        f_cleanup=_leave,
    )
    # TVM's pool has no limit of time: only the server watches it, and one that hangs would hold the job for ever.
    runner._inst.pool = pool
    return Laboratory(local_builder(None), runner, attempts=3 + count), machine


def count_workers(tracker: tuple[str, int], key: str) -> int:
    """Count the workers of a key, busy or idle.

    Raises:
        ConnectionError: there is no tracker.
        ValueError: there is no worker.

    """
    try:
        socket.create_connection(tracker, CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"there is no tracker at {tracker[0]}:{tracker[1]} ({error}); "
            "start one: python -m tvm.exec.rpc_tracker --port 9190"
        ) from None
    known = [server["key"].partition(":")[2] for server in rpc.connect_tracker(*tracker).summary()["server_info"]]
    if key not in known:
        keys = ", ".join(sorted(set(known))) or "none"
        raise ValueError(
            f"the tracker has no worker of key {key!r} (it has: {keys}); "
            f"start some: whet tune worker --tracker {tracker[0]}:{tracker[1]} --key {key}"
        )
    return known.count(key)


def _describe(config: Any, pool: PopenPoolExecutor) -> Machine:
    """Ask one of the workers what it is."""
    try:
        return Machine.from_json(pool.submit(_ask, config).result())
    except TimeoutError:
        raise ValueError(f"no worker of key {config.tracker_key!r} answers; are they busy with another job?") from None


def _ask(config: Any) -> str:
    session = config.connect_server()
    try:
        describe = session.get_function(DESCRIBE)
    except AttributeError:
        raise ValueError("a worker does not know kernels; start workers with: whet tune worker") from None
    return str(describe())


def _upload(session: Any, local: str, remote: str) -> str:
    """Send a module; the worker itself loads it, in another process than the session's."""
    session.upload(local, remote)
    return remote


def _allocate_nothing(_session: Any, device: Any, infos: Any, repeats: int) -> list[list[Any]]:
    return allocate_nothing(device, infos, repeats)


def _evaluate(
    cpu: str, seconds: float, session: Any, name: str, _device: Any, _config: Any, _arguments: Any
) -> list[float]:
    answer = json.loads(str(session.get_function(EVALUATE)(name, cpu, seconds)))
    if "stranger" in answer:
        raise ValueError(f"a worker is a {answer['stranger']}, the job is for {cpu}: give each CPU type its own key")
    if "error" in answer:
        raise ValueError(f"{CANDIDATE}: {answer['error']}")
    times: list[float] = answer["times"]
    return times


def _leave(_session: Any, _path: Any) -> None:
    """Leave the session's folder to the server, which deletes it."""
