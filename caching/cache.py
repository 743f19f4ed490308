"""What a freeze file holds: caches after some layers of one model, and how far each is trusted.

A cache is a handful of arrays, whatever its kind, so that one kernel looks requests up in all of them:

============  =========================  ======================================================================
``scale``     float32 ``(channels,)``    a request is ``z = mean · scale + shift``, of the mean of its hidden
``shift``     float32 ``(channels,)``    state after the layer
``rows``      int8 ``(rows, channels)``  its scores are ``rows · z · row_scale + row_bias``
``row_scale`` float32 ``(rows,)``
``row_bias``  float32 ``(rows,)``
============  =========================  ======================================================================

and three more. Scores above 0 are the hidden units h of a perceptron, which answers
``outputs · h · output_scale + output_bias`` with int8 ``(outputs, rows)`` and two float32 ``(outputs,)``. Caches of
clusters have ``answers`` int8 ``(rows, outputs)``, ``answer_scale`` float32 ``(rows,)`` and ``inverse_reach`` float32
``(rows,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Kind: TypeAlias = Literal["perceptron", "clusters"]

_LINEAR = ("scale", "shift", "rows", "row_scale", "row_bias")
ARRAYS: Mapping[str, tuple[str, ...]] = {
    "perceptron": (*_LINEAR, "outputs", "output_scale", "output_bias"),
    "clusters": (*_LINEAR, "answers", "answer_scale", "inverse_reach"),
}
"""The arrays of each kind, in the order in which ``look_up`` and the kernel take them."""


@dataclass(frozen=True, eq=False)
class Cache:
    """One cache. A request leaves there if the trust in its answer reaches ``threshold``."""

    layer: int
    """Layers that ran before; 0 is behind the embeddings."""
    kind: Kind
    arrays: tuple[NDArray[Any], ...]
    """See ``ARRAYS``."""
    threshold: float

    def __post_init__(self) -> None:
        names = ARRAYS.get(self.kind)
        if names is None:
            raise ValueError(f"the kind of a cache is {self.kind!r}; expected one of {', '.join(ARRAYS)}")
        if len(self.arrays) != len(names) or self.arrays[2].ndim != 2:
            raise ValueError(f"a cache of the kind {self.kind} has the arrays {', '.join(names)}")
        rows, channels = self.arrays[2].shape
        shapes = [(channels,), (channels,), (rows, channels), (rows,), (rows,)]
        if self.kind == "clusters":
            shapes += [(rows, *self.arrays[5].shape[1:2]), (rows,), (rows,)]
        else:
            outputs = self.arrays[7].shape[0]
            shapes += [(outputs, rows), (outputs,), (outputs,)]
        for name, array, shape in zip(names, self.arrays, shapes, strict=True):
            dtype = "int8" if name in ("rows", "outputs", "answers") else "float32"
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} of a cache is {array.dtype} {array.shape}; expected {dtype} {shape}")

    @property
    def channels(self) -> int:
        """Of the hidden state."""
        return int(self.arrays[2].shape[1])

    @property
    def outputs(self) -> int:
        """Of the model."""
        return int(self.arrays[5].shape[0 if self.kind == "perceptron" else 1])

    @property
    def size(self) -> int:
        """Bytes that the cache adds to a module."""
        return sum(array.nbytes for array in self.arrays)


def look_up(means: Floats, *arrays: NDArray[Any], kind: str) -> tuple[Floats, Floats]:
    """Look requests up, of which ``means`` ``(requests, channels)`` are the mean hidden states.

    Returns:
        float32 answers ``(requests, outputs)`` and trust ``(requests,)``. A perceptron's answers are logits, and the
        trust is the difference of their two largest softmax probabilities. Clusters answer with the row of
        ``answers`` of the nearest centroid c; a score there is ``z · c − |c|² / 2``, and the trust
        ``1 − |z − c|² · inverse_reach``, so that 0 is as far as the cluster reaches.

    """
    scale, shift, rows, row_scale, row_bias, *more = arrays
    z = means * scale + shift
    scores = _scores(z, rows, row_scale, row_bias)
    if kind == "perceptron":
        logits = _scores(np.maximum(scores, 0), *more)
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        second = np.partition(exps, -2, axis=1)[:, -2] if logits.shape[1] > 1 else 0
        return logits, (1 - second) / exps.sum(axis=1)
    answers, answer_scale, inverse_reach = more
    nearest = scores.argmax(axis=1)
    square = np.maximum(np.square(z).sum(axis=1) - 2 * scores.max(axis=1), 0)
    return answers[nearest] * answer_scale[nearest, None], 1 - square * inverse_reach[nearest]


def _scores(z: Floats, rows: NDArray[np.int8], scale: Floats, bias: Floats) -> Floats:
    scores: Floats = (z @ rows.T.astype(np.float32)) * scale + bias
    return scores


def to_int8(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Rows ``(rows, columns)`` as int8 in [-127, 127], and the scale of each ``(rows,)``."""
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale
