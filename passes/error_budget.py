"""How precise each layer has to be for the model's output to stay within a budget of error.

The error is the squared difference between the outputs of the quantised and the float model, over the variance of the
latter: noise over signal. It needs no labels, and means the same for embeddings, logits and hidden states. Layers are
judged by the error when they alone are quantised; the worst gets one level up until the whole is within the budget
(per-layer sensitivity and fallback, as in Intel Neural Compressor's and NNCF's accuracy-aware tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Level: TypeAlias = Literal["static", "per_token", "float32"]
"""How the input of a dense layer is rounded: one scale for all tokens, one for each, not at all."""
Layer = TypeVar("Layer")


def noise(output: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Squared error of ``output`` over the variance of ``reference``; both are rows ``(requests or tokens, C)``."""
    variance = np.square(reference - reference.mean(axis=0)).sum()
    return float(np.square(output - reference).sum() / max(variance, np.float32(1e-30)))


def choose_levels(
    ladders: Mapping[Layer, Sequence[Level]],
    error: Callable[[Mapping[Layer, Level]], float],
    budget: float,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[Layer, Level], dict[Layer, float]]:
    """Raise layers step by step up their ladders, which end with float32, until ``error`` is at most ``budget``.

    ``error`` tells that of the model with the given layers quantised and all others float32. ``progress`` is told how
    many layers were judged.

    Returns:
        The level of each layer, and for those that were raised the error of each alone at its lowest level.

    Raises:
        ValueError: the budget cannot be met.

    """
    levels = {layer: ladder[0] for layer, ladder in ladders.items()}
    if error(levels) <= budget:
        return levels, {}
    first: dict[Layer, float] = {}
    for i, (layer, level) in enumerate(levels.items(), 1):
        first[layer] = error({layer: level})
        progress(i)
    alone = dict(first)
    raised: dict[Layer, float] = {}
    while (total := error(levels)) > budget:
        if not alone:
            raise ValueError(
                f"max_error is {budget}, but with every layer in float32 the error is still {total:.2g}, from int8 "
                "word embeddings; allow more, or take precision 'fp32'"
            )
        worst = max(alone, key=lambda layer: alone[layer])
        levels[worst] = ladders[worst][ladders[worst].index(levels[worst]) + 1]
        raised[worst] = first[worst]
        if levels[worst] == "float32":
            del alone[worst]
        else:
            alone[worst] = error({worst: levels[worst]})
    return levels, raised
