"""The requests that every engine with static quantisation is calibrated with: random ids, good for timing alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import FIRST_ID, LAST_ID

COUNT, BATCH, SEQUENCE = 8, 2, 128


def batches() -> list[dict[str, Any]]:
    """Inputs of the model by name, int64 (batch, sequence) each."""
    random = np.random.default_rng(99)
    shape = (BATCH, SEQUENCE)
    return [
        {"input_ids": random.integers(FIRST_ID, LAST_ID, shape), "attention_mask": np.ones(shape, np.int64)}
        for _ in range(COUNT)
    ]
