"""Which instruction set this machine has."""

from __future__ import annotations

from collections.abc import Mapping

from whet.runtime.cpu import cpu_flags, request_amx
from whet.schedules.isa import ISAS, Isa


def host_isa(candidates: Mapping[str, Isa] = ISAS) -> Isa:
    """Return the fastest of these that runs here.

    AMX counts only if the kernel grants its registers, which old ones and some sandboxes do not.

    Raises:
        ValueError: not even the last of them does.

    """
    flags = cpu_flags()
    if not flags:
        raise ValueError("/proc/cpuinfo has no line of flags; name the instruction set instead of 'host'")
    for candidate in candidates.values():
        if flags.issuperset(candidate.cpu_flags) and not (candidate.has_amx and request_amx()):
            return candidate
    missing = ", ".join(f for f in candidate.cpu_flags if f not in flags)
    raise ValueError(f"this CPU lacks {missing}, so it has none of {', '.join(candidates)}")
