"""What a machine is to tuning: the type of its CPU, and what that can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from whet.runtime.cpu import cpu_flags, cpu_model, request_amx
from whet.schedules.isa import ISAS, Isa


@dataclass(frozen=True)
class Machine:
    """A machine that kernels are timed on, this one or a worker."""

    cpu: str
    """The microarchitecture, as ``cpu_type`` names it."""
    name: str
    """The CPU as its maker sells it; clouds hide it, and many names are one microarchitecture."""
    flags: tuple[str, ...]
    amx: str
    """Why the kernel refuses the tile registers; empty if it does not."""

    @staticmethod
    def here() -> Machine:
        """Look at the machine that this runs on."""
        return Machine(cpu_type(), cpu_model(), tuple(sorted(cpu_flags())), request_amx())

    def to_json(self) -> str:
        """One line of JSON from which ``from_json`` makes an equal machine."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Machine:
        """Read what ``to_json`` wrote."""
        value = json.loads(text)
        return Machine(**{**value, "flags": tuple(value["flags"])})

    def why_not(self, target: Isa) -> str:
        """Say why it can't run code for ``target``, in a few words; empty if it can."""
        if missing := sorted(set(target.cpu_flags) - set(self.flags)):
            return f"it lacks {', '.join(missing)}"
        return self.amx if "amx_tile" in target.cpu_flags else ""

    def best_isa(self, candidates: Mapping[str, Isa] = ISAS) -> Isa:
        """Return the first that it can run; ValueError if there is none."""
        for candidate in candidates.values():
            if not self.why_not(candidate):
                return candidate
        raise ValueError(f"{self.name} can run none of {', '.join(candidates)}: {self.why_not(candidate)}")


def cpu_type() -> str:
    """Name this CPU's microarchitecture as its maker numbers it, say ``GenuineIntel family 6 model 207``.

    Names that CPUs are sold by say less: one microarchitecture has dozens, and virtual machines often show none.
    """
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    numbers = [fields.get(name, "unknown") for name in ("vendor_id", "cpu family", "model")]
    return "{} family {} model {}".format(*numbers)
