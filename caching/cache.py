"""What a freeze file holds: a small predictor after some layers of one model, and when its answer is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Cache:
    """A linear predictor of the model's logits from the mean of a request's hidden state after a layer.

    A request leaves there when the largest softmax probability of ``weight · mean + bias`` reaches ``threshold``.
    """

    layer: int
    """Layers that ran before, at least 1."""
    weight: NDArray[np.float32]
    """``(labels, channels)``."""
    bias: NDArray[np.float32]
    """``(labels,)``."""
    threshold: float
