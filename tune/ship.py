"""Choose the records that ship with Whet: the verdicts of folders that ``whet tune`` wrote, and nothing else.

    python -m whet.tune.ship RECORDS …     # in a clone: writes tune/shipped-records

Verdicts of other kernel generators than today's are left out; what stands there already stays if nothing replaces it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from whet.tune.records import SHIPPED, Record, all_records, format_record


def ship(folders: Iterable[str | PathLike[str]], into: Path = SHIPPED) -> dict[str, int]:
    """Write the last verdict of every kernel to ``into``, if it is another setting than the default.

    Returns:
        Verdicts of each file, by its name.

    Raises:
        FileNotFoundError: a folder holds no records.

    """
    counts = {}
    for records in (each for folder in folders for each in all_records(folder)):
        path = into / records.path.name
        known = {} if not path.exists() else {r.instance: r for r in _open(into, path.name)}
        for instance in dict.fromkeys(r.instance for r in records.records):
            if verdict := records.settled(instance):
                known[instance] = verdict
        lines = [format_record(r, records.cpu) for r in known.values() if r.knobs != r.instance.default_knobs()]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        counts[path.name] = len(lines)
    return counts


def _open(folder: Path, name: str) -> list[Record]:
    return next((each.records for each in all_records(folder) if each.path.name == name), [])


if __name__ == "__main__":
    print(ship(sys.argv[1:]))
