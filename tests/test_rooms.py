"""The rooms of the house: what the files of each may import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "frontend": ("whet.schedules", "whet.tune", "whet.compiler", "torch", "transformers"),
    "passes": ("whet.frontend", "whet.tune", "whet.compiler", "whet.runtime"),
    "schedules": ("whet.frontend", "whet.passes", "whet.compiler", "whet.runtime", "tvm.relax"),
    "tune": ("whet.frontend", "whet.passes", "whet.compiler", "torch", "transformers"),
    "compress": (
        "tvm",
        "whet.frontend",
        "whet.passes",
        "whet.schedules",
        "whet.tune",
        "whet.compiler",
        "whet.compressing",
        "transformers",
    ),
    "caching": ("tvm", "torch", "transformers", "whet.frontend", "whet.passes", "whet.schedules", "whet.compiler"),
    "runtime": ("tvm", "torch", "transformers", "whet.frontend", "whet.passes", "whet.schedules", "whet.compiler"),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports at its top level, relative ones resolved."""
    package = ["whet", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path} imports {name}"


def test_every_pass_has_a_test():
    tests = " ".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    passes = [p for p in (ROOT / "passes").glob("*.py") if f"\ndef {p.stem}(" in p.read_text()]
    assert len(passes) > 8
    for path in passes:
        assert f"from whet.passes.{path.stem} import" in tests, f"{path} has no test"


def test_every_room_is_installed():
    """An editable installation finds a package that pyproject.toml forgot; a wheel does not have it."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*)\]$", project, re.M)[1]
    folders = [p.parent.relative_to(ROOT) for p in ROOT.glob("[a-z]*/**/__init__.py")]
    packages = [f for f in folders if f.parts[0] not in ("benchmarks", "build", "tests", "whet")]
    assert len(packages) > 4
    for folder in packages:
        name = f'"{".".join(["whet", *folder.parts])}"'
        assert name in listed and f'\n{name} = "{folder}"\n' in project
