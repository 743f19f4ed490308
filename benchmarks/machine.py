"""What one core of this machine can do at most: ``peaks.c``, compiled and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from whet.link import find_compiler

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COMMON = {2: 2 << 20, 3: 32 << 20}
"""Bytes of caches of a machine that does not tell."""
UNITS = {"K": 1 << 10, "M": 1 << 20}


def measure_peaks(folder: Path, cpu: int) -> dict[str, dict[str, float]]:
    """Peaks by name: 1e9 operations (a multiply-add is two) or 1e9 bytes per second, of one core.

    Returns:
        ``{"peaks": {...}}``, or without a C compiler ``{}``.

    """
    try:
        compiler = find_compiler()
    except FileNotFoundError:
        return {}
    program = folder / "peaks"
    source = Path(__file__).with_name("peaks.c")
    subprocess.run([compiler, "-O2", str(source), "-o", str(program)], check=True)
    command = ["taskset", "-c", str(cpu), str(program), str(cache_bytes(2)), str(cache_bytes(3))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {"peaks": {name: float(value) for name, value in map(str.split, lines)}}


def cache_bytes(level: int) -> int:
    """Size of the data cache of that level."""
    for index in sorted(CACHES.glob("index*")):
        if (index / "level").read_text().strip() == str(level):
            size = (index / "size").read_text().strip()
            return int(size[:-1]) * UNITS[size[-1]]
    return COMMON[level]
