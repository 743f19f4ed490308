"""The hand-made modules of the runtime's tests, for the commands that run modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[1] / "runtime"


@pytest.fixture(scope="session")
def tiny_modules(tmp_path_factory):
    """One module per task, as ``tests/runtime/conftest.py`` makes them."""
    sys.path.insert(0, str(RUNTIME))
    spec = importlib.util.spec_from_file_location("runtime_conftest", RUNTIME / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return conftest.modules.__wrapped__(tmp_path_factory)
