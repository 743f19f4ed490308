"""How many threads a call may use, and telling TVM's thread pool.

TVM keeps one pool per calling thread and sizes it once, when that thread first runs something parallel.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from pathlib import Path

from whet.runtime.ffi import tvm_ffi

# tvm::runtime::threading::SetMaxConcurrency(int), exported by libtvm_runtime but not registered as a function.
_SET_MAX_CONCURRENCY = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_SHARE_ALL_CORES = -3

# Pools read these when they start, also one that the compiler starts in this process. Pinned workers of co-located
# processes fight for the same cores, and TVM's own 300 000 rounds of spinning (0.1 s) after every call burn the CPU
# quota of a container.
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")


def available_cpus(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may use: its affinity, limited by the CPU quota of its control groups, at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroup_folders(cgroups, process) if (quota := _quota(folder))]
    return max(1, min([cpus, *(math.ceil(quota) for quota in quotas)]))


def _cgroup_folders(cgroups: Path, process: Path) -> list[Path]:
    """List the control groups of this process and their ancestors: version 2, and the cpu controller of version 1."""
    folders = [cgroups, cgroups / "cpu"]
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            top = cgroups / "cpu" if controllers else cgroups
            path = Path(group.lstrip("/"))
            folders += [top / p for p in (path, *path.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
        except OSError:
            return None
    return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


class _Configured(threading.local):
    threads: int | None = None
    """What this thread is set to."""
    pool_process: int | None = None
    """The process in which this thread's pool was started; workers do not survive a fork."""


_configured = _Configured()


def use_threads(threads: int, runtime: ctypes.CDLL) -> bool:
    """Make what the calling thread runs next use ``threads`` threads, itself included.

    Returns:
        False if it cannot: its pool was started smaller, or before a fork. A new thread can.

    """
    if _configured.pool_process not in (None, os.getpid()) and threads > 1:
        return False
    if _configured.threads == threads:
        return True
    if threads == 1 and hasattr(runtime, _SET_MAX_CONCURRENCY):
        # Parallel loops then run where they stand; no pool is started that would later be too small.
        getattr(runtime, _SET_MAX_CONCURRENCY)(ctypes.c_int(1))
    else:
        # A pool started here gets one worker per CPU named. Which ones matters only if TVM_BIND_THREADS is 1.
        cpus = sorted(os.sched_getaffinity(0))
        named = [str(cpus[i % len(cpus)]) for i in range(threads)]
        tvm_ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, threads, named)
        _configured.pool_process = os.getpid()
        if tvm_ffi.get_global_func("runtime.NumThreads")() < threads:
            _configured.threads = None
            return False
    _configured.threads = threads
    return True
