"""What this CPU can do, checked before any compiled code runs: an unknown instruction would kill the process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from functools import cache
from pathlib import Path

from whet.runtime.metadata import ArtifactError

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of this CPU, named as in ``/proc/cpuinfo``."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def check_cpu(required: Collection[str], isa: str) -> None:
    """Raise unless this CPU has every flag of ``required``.

    Raises:
        ArtifactError: names the missing flags and how to recompile for this machine.

    """
    if platform.machine() != "x86_64":
        raise ArtifactError(f"the module holds x86-64 code; this machine is {platform.machine()}")
    missing = sorted(set(required) - cpu_flags())
    if missing:
        raise ArtifactError(
            f"the module was compiled for {isa}; this CPU lacks {', '.join(missing)}. Compile it on this machine, or "
            "elsewhere for an instruction set that this CPU has (avx2 runs on any x86-64 CPU since 2015)"
        )


def request_amx() -> None:
    """Ask the kernel for the AMX tile registers, for this process and the threads it will start.

    Linux 5.16 and later keep the 8 KiB of tile state from a process until it asks (``arch_prctl(2)``,
    ``ARCH_REQ_XCOMP_PERM``). Asking again is harmless. It must precede the start of the worker threads.

    Raises:
        ArtifactError: the kernel refuses, as old kernels and some sandboxes do.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) != 0:
        raise ArtifactError(
            f"the kernel refuses the AMX registers ({os.strerror(ctypes.get_errno())}): Linux 5.16 or later is needed, "
            "and sandboxes must allow arch_prctl; or compile the model for avx512_vnni"
        )
