"""What this CPU can do, checked before any compiled code runs: an unknown instruction would kill the process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from whet.runtime.metadata import ArtifactError, Metadata

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


def cpu_model() -> str:
    """Name of this CPU, as in ``/proc/cpuinfo``."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "unknown CPU"


def choose_variant(variants: Sequence[Metadata], isa: str | None = None) -> Metadata:
    """Choose the code to run: the first that this CPU can run, or the one for ``isa``.

    Raises:
        ValueError: there is none for ``isa``.
        ArtifactError: this CPU cannot run it; says what the CPU lacks, and how to recompile.

    """
    candidates = [variant for variant in variants if isa in (None, variant.isa)]
    if not candidates:
        raise ValueError(f"isa is {isa!r}; the module holds code for {', '.join(v.isa for v in variants)}")
    reasons = []
    for variant in candidates:
        if not (reason := why_not(variant)):
            return variant
        reasons.append(f"{variant.isa}: {reason}")
    raise ArtifactError(
        f"this machine cannot run what the module was compiled for ({'; '.join(reasons)}). Compile it on this machine, "
        "or elsewhere for an instruction set that it has (avx2 runs on any x86-64 CPU since 2015)"
    )


def why_not(variant: Metadata) -> str:
    """Say why this machine cannot run code, in a few words; empty if it can.

    Asks the kernel for the AMX registers if the code needs them.
    """
    if platform.machine() != "x86_64":
        return f"this machine is {platform.machine()}, not x86-64"
    if missing := sorted(set(variant.cpu_flags) - cpu_flags()):
        return f"this CPU lacks {', '.join(missing)}"
    return request_amx() if "amx_tile" in variant.cpu_flags else ""


def request_amx() -> str:
    """Ask the kernel for the AMX tile registers, for this process and the threads it will start.

    Linux 5.16 and later keep the 8 KiB of tile state from a process until it asks (``arch_prctl(2)``,
    ``ARCH_REQ_XCOMP_PERM``). Asking again is harmless. It must precede the start of the worker threads.

    Returns:
        Why the kernel refuses, as old kernels and some sandboxes do; empty if it does not.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return ""
    return (
        f"the kernel refuses the AMX registers ({os.strerror(ctypes.get_errno())}), Linux 5.16 or later is needed and "
        "sandboxes must allow arch_prctl"
    )
