"""What answers lose that are computed another way, without their truth: for memo files, which have no labels.

Of a classifier the share of the answers that change would say little where few requests are held out: whether one
changes depends on how near to a border it happens to be. The total variation of the probabilities says on average as
much, and all requests tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.metrics import cosines
from whet.runtime.metadata import Metadata
from whet.runtime.spans import softmax


def losses(
    metadata: Metadata, plain: Sequence[NDArray[np.float32]], other: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """What each request loses, ``(requests,)``, from 0.

    Of classes 1 if the likeliest is another one, else the total variation of their probabilities: per request, on
    average of the tokens, or of both ends of an answer. Of a single score half the squared difference, over the
    variance of all requests' scores. Of embeddings 1 − cosine, on average of the tokens where each has one.

    Args:
        metadata: of the module.
        plain: rows of each request, ``(1 or tokens, channels)``.
        other: the same, computed another way.

    """
    if metadata.task == "sequence_classification" and metadata.output.channels == 1:
        a, b = (np.array([float(row.reshape(-1)[0]) for row in rows]) for rows in (plain, other))
        return np.asarray(np.square(a - b) / 2 / max(float(a.var()), 1e-12))
    if metadata.task == "question_answering":
        return np.array([_of_classes(a.T, b.T) for a, b in zip(plain, other, strict=True)])
    if metadata.task in ("sequence_classification", "token_classification"):
        return np.array([_of_classes(a, b) for a, b in zip(plain, other, strict=True)])
    return np.array([_of_embeddings(a, b) for a, b in zip(plain, other, strict=True)])


def _of_classes(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of logits ``(answers, classes)``."""
    variation = np.abs(softmax(a) - softmax(b)).sum(axis=1) / 2
    return float(np.where(a.argmax(axis=1) != b.argmax(axis=1), 1, variation).mean())


def _of_embeddings(a: NDArray[Any], b: NDArray[Any]) -> float:
    return 0.0 if np.array_equal(a, b) else float(1 - cosines(a, b).mean())
