"""The optimiser of what is learned here, in NumPy, so that learning needs no framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]

_WARM_UP = 0.1
"""Share of the steps in which the rate rises; then it falls."""
_DECAY = 0.01
"""Of the weights, per step, in units of the rate."""


class Adam:
    """AdamW (Loshchilov and Hutter 2019) over so many steps; changes the parameters in place."""

    def __init__(self, parameters: Sequence[Floats], steps: int, rate: float) -> None:
        self._parameters = parameters
        self._moments: list[list[Any]] = [[np.zeros_like(p), np.zeros_like(p)] for p in parameters]
        self._steps, self._rate = steps, rate
        self._step = 0

    def step(self, gradients: Sequence[Floats]) -> None:
        """Take a step, by the gradient of each parameter."""
        self._step += 1
        done = self._step / self._steps
        rate = self._rate * min(done / _WARM_UP, (1 - done) / (1 - _WARM_UP))
        for parameter, moment, gradient in zip(self._parameters, self._moments, gradients, strict=True):
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.999 * moment[1] + 0.001 * gradient * gradient
            unbiased = moment[1] / (1 - 0.999**self._step)
            parameter *= 1 - rate * _DECAY
            parameter -= rate / (1 - 0.9**self._step) * moment[0] / (np.sqrt(unbiased) + 1e-8)


def dense(rng: np.random.Generator, rows: int, channels: int) -> tuple[Floats, Floats]:
    """Weights ``(rows, channels)`` to start from, and biases of 0."""
    weight = rng.uniform(-1, 1, (rows, channels)) / np.sqrt(channels)
    return weight.astype(np.float32), np.zeros(rows, np.float32)
