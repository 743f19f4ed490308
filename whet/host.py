"""Which instruction set this machine has."""

from __future__ import annotations

from collections.abc import Mapping

from whet.schedules.isa import ISAS, Isa
from whet.tune.machine import Machine


def host_isa(candidates: Mapping[str, Isa] = ISAS) -> Isa:
    """Return the fastest of these that runs here; ValueError if not even the last does.

    AMX counts only if the kernel grants its registers, which old ones and some sandboxes do not.
    """
    return Machine.here().best_isa(candidates)
