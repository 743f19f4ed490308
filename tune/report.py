"""What tuning gained, kernel by kernel."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

from whet.tune.instance import Instance
from whet.tune.records import Records, all_records


@dataclass(frozen=True)
class Gain:
    """The verdict on one kernel."""

    kernel: str
    isa: str
    cpu: str
    trials: int
    knobs: dict[str, int]
    default: dict[str, int]
    tokens: tuple[int, ...]
    ratios: tuple[float, ...]
    """Times of ``knobs`` over those of ``default``, for each of ``tokens``."""
    seconds: tuple[float, ...]
    """Times of ``default``."""

    @property
    def speedup(self) -> float:
        """How many times as fast as the default, the geometric mean over token counts."""
        return math.exp(-sum(map(math.log, self.ratios)) / len(self.ratios))


@dataclass(frozen=True)
class TuningReport:
    """``print(report)`` shows a table, ``to_json`` gives it to scripts."""

    gains: tuple[Gain, ...]
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """The geometric mean over the kernels."""
        return math.exp(sum(math.log(g.speedup) for g in self.gains) / len(self.gains)) if self.gains else 1.0

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps({**asdict(self), "speedup": self.speedup}, indent=1)

    def __str__(self) -> str:
        lines = []
        for isa, cpu in dict.fromkeys((g.isa, g.cpu) for g in self.gains):
            lines += [f"{isa} on {cpu}:", f"  {'kernel':52} {'trials':>6} {'gain':>6}  time over default at … tokens"]
            for gain in (g for g in self.gains if (g.isa, g.cpu) == (isa, cpu)):
                each = "  ".join(f"{t}: {r:.2f}" for t, r in zip(gain.tokens, gain.ratios, strict=True))
                changed = {k: v for k, v in gain.knobs.items() if v != gain.default[k]}
                what = ", ".join(f"{k} {gain.default[k]} → {v}" for k, v in changed.items()) or "default"
                lines.append(f"  {gain.kernel:52} {gain.trials:6} {gain.speedup - 1:+6.1%}  {each}  ({what})")
        lines.append(f"{len(self.gains)} kernels, {self.speedup - 1:+.1%} (geometric mean)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def report(folder: str | PathLike[str]) -> TuningReport:
    """Report on a folder of records. FileNotFoundError if it holds none."""
    return report_records(all_records(folder))


def report_records(opened: Sequence[Records], only: Sequence[Instance] | None = None) -> TuningReport:
    """Report on records, of all settled kernels or of those named."""
    gains = []
    for records in opened:
        instances = dict.fromkeys(r.instance for r in records.records) if only is None else only
        for instance in instances:
            verdict = records.settled(instance)
            if verdict is not None:
                gains.append(
                    Gain(
                        str(instance),
                        records.isa,
                        records.cpu,
                        len(records.measured(instance)),
                        asdict(verdict.knobs),
                        asdict(instance.default_knobs()),
                        instance.tokens,
                        verdict.ratios,
                        verdict.seconds,
                    )
                )
    return TuningReport(tuple(gains), tuple(note for records in opened for note in records.notes()))
