"""Environments that the engines run in: one each, made of the versions in peers/ENVIRONMENT.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


class Unavailable(Exception):
    """An environment that can't be made, and why."""


def make_environment(name: str, root: Path) -> Path:
    """Make ``root/name`` unless it is there with the same versions; returns its Python.

    The first line of the requirements names the Python version, as ``# python 3.11``.

    Raises:
        Unavailable: that Python is not on this machine, or pip failed.

    """
    requirements = PEERS / f"{name}.txt"
    wanted = requirements.read_text(encoding="ascii")
    folder = root / name
    python = folder / "bin/python"
    stamp = folder / "requirements.txt"
    if stamp.exists() and stamp.read_text(encoding="ascii") == wanted:
        return python
    release = wanted.splitlines()[0].removeprefix("# python ")
    print(f"making the environment {name} (Python {release})", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _run(name, str(find_python(release)), "-m", "venv", str(folder))
    _run(name, str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements))
    stamp.write_text(wanted, encoding="ascii")
    return python


def find_python(release: str) -> Path:
    """Find an interpreter of ``release`` (as "3.11"): on the path, of pyenv, of uv, or the running one.

    Raises:
        Unavailable: there is none.

    """
    for path in _pythons(release):
        probe = [str(path), "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.stdout.strip() == release:
            return path
    raise Unavailable(
        f"Python {release} with venv is not on this machine; install it (uv python install {release}, "
        f"pyenv install {release}, or apt-get install python{release}-venv)"
    )


def _pythons(release: str) -> Iterator[Path]:
    yield Path(sys.executable)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if (path := Path(folder) / f"python{release}").exists():
            yield path
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in sorted(versions.glob(f"{release}.*")):
        yield version / "bin/python"
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", release], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            yield Path(found.stdout.strip())


def _run(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        faults = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no message"]
        raise Unavailable(f"{name}: {faults[-1]}")
