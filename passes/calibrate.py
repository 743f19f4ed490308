"""Calibration: watch the fp32 graph on real requests and choose a range for each activation that becomes integer.

``observe`` collects; ``affine_u8`` and ``symmetric_s8`` turn an observation into a scale. Outliers carry meaning in
transformer encoders, so the default never clips blindly: it searches the range with the least squared rounding error,
and that may be the whole range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from tvm import IRModule

from .interpret import interpret

Method: TypeAlias = Literal["mse", "minmax", "percentile"]
Array: TypeAlias = np.ndarray[Any, Any]

SAMPLE = 1 << 14
"""Values kept of each activation per batch of requests, beside its extremes."""


class Observation:
    """Extremes and a random sample of everything one value has been."""

    def __init__(self, seed: int) -> None:
        self.low = np.inf
        self.high = -np.inf
        self._samples: list[Array] = []
        self._random = np.random.default_rng(seed)

    def add(self, values: Array) -> None:
        """Take in more values, of any shape."""
        flat = values.reshape(-1)
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        self._samples.append(self._random.choice(flat, min(flat.size, SAMPLE)))

    @property
    def sample(self) -> Array:
        """The sampled values, 1-D float32."""
        return np.concatenate(self._samples)


Observations: TypeAlias = dict[str, list[Observation]]
"""By variable name: one observation per equal part of the channels (three for Q, K and V, else one)."""


def observe(
    module: IRModule,
    wanted: dict[str, int],
    requests: Sequence[Array],
    token_types: Sequence[Array] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """Run ``module`` on ``requests`` (1-D token ids) and observe the variables ``wanted`` (name to number of parts)."""
    seen: Observations = {
        name: [Observation(seed=1000 * i + j) for j in range(parts)] for i, (name, parts) in enumerate(wanted.items())
    }

    def watch(name: str, rows: Array) -> None:
        for observation, part in zip(seen.get(name, ()), np.split(rows, wanted.get(name, 1), axis=1), strict=False):
            observation.add(part)

    run(module, requests, token_types, watch, progress)
    return seen


def run(
    module: IRModule,
    requests: Sequence[Array],
    token_types: Sequence[Array] | None,
    watch: Callable[[str, Array], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run ``module`` on ``requests``, a few at a time; ``watch`` gets the name and the rows of every value."""
    step = 32
    for start in range(0, len(requests), step):
        types = None if token_types is None else token_types[start : start + step]
        interpret(module, requests[start : start + step], types, watch)
        if progress is not None:
            progress(min(start + step, len(requests)))


def affine_u8(observation: Observation, method: Method, percentile: float) -> tuple[float, int]:
    """Scale and zero point for uint8; the range always contains 0."""
    best = (np.inf, 1.0, 0)
    for low, high in _ranges(observation, method, percentile):
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255.0, 1e-8)
        zero = int(np.clip(round(-low / scale), 0, 255))
        error = _error(observation, method, scale, zero, 0, 255)
        if error < best[0]:
            best = (error, scale, zero)
    return best[1], best[2]


def symmetric_s8(observation: Observation, method: Method, percentile: float) -> float:
    """Scale for int8 in [-127, 127] with zero point 0."""
    best = (np.inf, 1.0)
    for low, high in _ranges(observation, method, percentile):
        scale = max(abs(low), abs(high), 1e-8) / 127.0
        error = _error(observation, method, scale, 0, -127, 127)
        if error < best[0]:
            best = (error, scale)
    return best[1]


def _ranges(observation: Observation, method: Method, percentile: float) -> list[tuple[float, float]]:
    low, high = observation.low, observation.high
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(
            "an activation has no finite values on the calibration requests; check the weights and the texts"
        )
    if method == "minmax":
        return [(low, high)]
    if method == "percentile":
        tail = (100.0 - percentile) / 2
        cut_low, cut_high = np.percentile(observation.sample, [tail, 100.0 - tail])
        return [(float(cut_low), float(cut_high))]
    return [(low * share, high * share) for share in np.linspace(1.0, 0.2, 41)]


def _error(observation: Observation, method: Method, scale: float, zero: int, low: int, high: int) -> float:
    """Mean squared error of rounding and clipping, needed only where there is a choice."""
    if method != "mse":
        return 0.0
    # The extremes are added once: the sample may have missed them.
    values = np.append(observation.sample, np.array([observation.low, observation.high], np.float32))
    rounded = (np.clip(np.rint(values / scale) + zero, low, high) - zero) * scale
    return float(np.square(values - rounded).mean())
