"""Records of tuning: one text file per instruction set and CPU model, one JSON object per line.

A line is whole by itself, so files merge by putting their lines together, and several processes may add to one at the
same time. A line holds the version of the kernel generators that it was measured with (a hash of their sources); lines
of other versions are kept, but never applied.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import whet.schedules
from whet.runtime.cpu import cpu_model
from whet.schedules.isa import ISAS, Isa
from whet.tune.instance import Instance, Knobs, key

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One measured setting of one kernel.

    ``ratios`` are its times over those of the default, measured in turns with it, one for each of
    ``instance.tokens``; empty if it could not be built or run, and then ``error`` says why. ``seconds`` are those of
    the default. ``settled`` marks the verdict of a kernel: the setting that won against the best of the others.
    """

    instance: Instance
    knobs: Knobs
    ratios: tuple[float, ...]
    seconds: tuple[float, ...] = ()
    error: str = ""
    settled: bool = False

    @property
    def ratio(self) -> float:
        """The mean over token counts; infinite for a failure."""
        return sum(self.ratios) / len(self.ratios) if self.ratios else float("inf")


@dataclass
class Records:
    """The records of one instruction set on one CPU model, with what was read so far.

    ``skipped`` counts the lines of the file that are not used, by reason.
    """

    path: Path
    isa: str
    cpu: str
    version: str
    records: list[Record] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def open(folder: str | PathLike[str], target: Isa, cpu: str | None = None) -> Records:
        """Read the records of ``target`` on a CPU model, by default this machine's; the file need not exist.

        Raises:
            FileNotFoundError: the folder does not exist.

        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; create it, or name the folder that has the records")
        cpu = cpu or cpu_model()
        records = Records(folder / file_name(target.name, cpu), target.name, cpu, generator_version())
        if records.path.exists():
            for line in records.path.read_text(encoding="utf-8", errors="replace").splitlines():
                records._read(line)
        return records

    def _read(self, line: str) -> None:
        try:
            record = _parse(line, self.isa, self.cpu, self.version)
        except _Unusable as why:
            self.skipped[str(why)] += 1
        else:
            self.records.append(record)

    def add(self, record: Record) -> None:
        """Append a record to the file, at once and whole, also while another process does the same."""
        line = _format(record, self.cpu, self.version)
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A writer that was killed may have left half a line: it ends here, and is skipped as corrupt.
            broken = file.tell() and not self.path.read_bytes().endswith(b"\n")
            file.write(b"\n" * bool(broken) + line.encode() + b"\n")
        self.records.append(record)

    def measured(self, instance: Instance) -> dict[Knobs, Record]:
        """Every setting of a kernel that was tried, the last record of each."""
        return {r.knobs: r for r in self.records if r.instance == instance and not r.settled}

    def settled(self, instance: Instance) -> Record | None:
        """The verdict of a kernel: the last one."""
        return next((r for r in reversed(self.records) if r.instance == instance and r.settled), None)

    def notes(self) -> tuple[str, ...]:
        """One sentence for each reason why lines were not used."""
        return tuple(f"{self.path}: {count} records not used: {why}" for why, count in self.skipped.items())


class _Unusable(Exception):
    """Why a line is not used."""


def _format(record: Record, cpu: str, version: str) -> str:
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "cpu": cpu,
        "kernel": record.instance.to_json(),
        "knobs": asdict(record.knobs),
        "ratios": [round(r, 4) for r in record.ratios],
        "seconds": [float(f"{s:.4g}") for s in record.seconds],
    }
    if record.error:
        value["error"] = record.error
    if record.settled:
        value["settled"] = True
    return json.dumps(value)


def _parse(line: str, isa: str, cpu: str, version: str) -> Record:
    try:
        value = json.loads(line)
        found = value["format"], value["version"], value["cpu"], value["kernel"]["isa"]
    except (ValueError, KeyError, TypeError):
        raise _Unusable("corrupt") from None
    if found[0] != FORMAT:
        raise _Unusable(f"format {found[0]}, this Whet reads {FORMAT}")
    if found[2:] != (cpu, isa):
        raise _Unusable(f"made on {found[2]} for {found[3]}")
    if found[1] != version:
        raise _Unusable("made with other kernel generators; tune again")
    try:
        instance = Instance.from_json(value["kernel"])
        ratios = tuple(float(r) for r in value["ratios"])
        seconds = tuple(float(s) for s in value["seconds"])
        knobs = instance.knobs(value["knobs"])
    except (ValueError, KeyError, TypeError):
        raise _Unusable("corrupt") from None
    if len(ratios) not in (0, len(instance.tokens)) or any(r <= 0 for r in ratios):
        raise _Unusable("corrupt")
    return Record(instance, knobs, ratios, seconds, str(value.get("error", "")), bool(value.get("settled")))


def merge(into: str | PathLike[str], sources: Iterable[str | PathLike[str]]) -> dict[str, int]:
    """Add the lines of other folders of records to those of ``into``, which is made if it does not exist.

    Lines that stand there already are not added again; what is no JSON object is left out. Lines of any version are
    kept: each Whet uses its own.

    Returns:
        Lines added, by file name.

    Raises:
        FileNotFoundError: a source does not exist, or holds no records.

    """
    into = Path(into)
    found = [(source, sorted(Path(source).glob("*.jsonl"))) for source in sources]
    for source, files in found:
        if not files:
            raise FileNotFoundError(f"there are no records (*.jsonl) in {source}; name a folder that whet tune wrote")
    into.mkdir(parents=True, exist_ok=True)
    added: dict[str, int] = {}
    for path in (path for _, files in found for path in files):
        with (into / path.name).open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            known = set(text.splitlines())
            lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _whole(line)]
            new = [line for line in dict.fromkeys(lines) if line not in known]
            file.write("\n" * bool(text and not text.endswith("\n")) + "".join(line + "\n" for line in new))
        added[path.name] = added.get(path.name, 0) + len(new)
    return added


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def file_name(isa: str, cpu: str) -> str:
    """Name of the file with the records of one instruction set on one CPU model."""
    return f"{isa}--{re.sub(r'[^A-Za-z0-9]+', '-', cpu).strip('-')}.jsonl"


@cache
def generator_version() -> str:
    """Return a hash of the kernel generators' sources: what was measured with others is not known to hold for these."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(whet.schedules.__file__)).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class TunedKnobs:
    """Answers the passes when they ask for the knobs of a kernel; counts how often records had an answer."""

    def __init__(self, folder: str | PathLike[str], targets: Iterable[Isa]) -> None:
        self.records = {target.name: Records.open(folder, target) for target in targets}
        self.asked: set[str] = set()
        self.known: set[str] = set()

    def __call__(self, spec: Any, target: Isa, density: float) -> Any:
        """The knobs that won for this kernel, or None for its defaults."""
        instance = Instance.of(spec, target, density)
        self.asked.add(key(instance))
        settled = self.records[target.name].settled(instance)
        if settled is None:
            return None
        self.known.add(key(instance))
        return settled.knobs

    def notes(self) -> tuple[str, ...]:
        """What was and was not found, in sentences."""
        found = f"Knobs of {len(self.known)} of {len(self.asked)} kernels come from records of {cpu_model()}."
        return (found, *(note for records in self.records.values() for note in records.notes()))


def all_records(folder: str | PathLike[str]) -> list[Records]:
    """Every file of records in a folder. FileNotFoundError if there is none."""
    opened = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if _whole(line):
                cpu, name = json.loads(line).get("cpu", ""), path.name.partition("--")[0]
                if name in ISAS and file_name(name, cpu) == path.name:
                    opened.append(Records.open(folder, ISAS[name], cpu))
                    break
    if not opened:
        raise FileNotFoundError(f"there are no records (*.jsonl) in {folder}; name a folder that whet tune wrote")
    return opened
