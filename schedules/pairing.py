"""Orders blocks of weights so that the products of two may be added in 16 bits: an exact use of vpmaddubsw.

That instruction multiplies u8 activations by s8 weights and adds two neighbouring products in 16 bits, where they may
saturate. They can't if neither the positive nor the negative weights of a sum add up to more than 128, for activations
are at most 255. The same holds of the sum of two such results and the four weights in it. Which weights meet, and with
which sign, is decided here, when a layer is packed:

- A channel of a block may be *flipped*, for all of its rows: x·w = 255·w + (255 − x)·(−w).
- A block that breaks the rule by itself, however flipped, becomes two, w = a + b at the same place.
- Every block gets a partner that it keeps the rule with, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = (1, 2, 4)
"""Rows that a block may have here."""

LIMIT = 127
"""Most that the weights of one sign in a sum may add up to; one less than could be, so that two limits fit a byte."""

_FLIPS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int8)
"""Ways to flip two neighbouring channels."""

_AT_ONCE = 32
"""Lists that are paired together: their limits stay in cache."""


@dataclass(frozen=True)
class Paired:
    """Blocks of several lists, one list after the other; partners stand together."""

    counts: NDArray[Any]
    """Blocks of each list ``(lists,)``, even."""
    quads: NDArray[Any]
    """Where each block stands ``(blocks,)``."""
    flips: NDArray[Any]
    """Which of its channels are flipped, as bits ``(blocks,)``."""
    weights: NDArray[Any]
    """s8 ``(blocks, rows, 4)``, those of flipped channels negated; zeros only where a block has no partner."""

    def corrections(self) -> NDArray[Any]:
        """What flipped channels take from the sum of each row ``(lists, rows)``: it must be added."""
        of_blocks = -255 * (self.weights * _channels(self.flips)[:, None]).sum(axis=2, dtype=np.int64)
        total = np.zeros((len(self.counts), self.weights.shape[1]), np.int64)
        np.add.at(total, np.arange(len(self.counts)).repeat(self.counts), of_blocks)
        return total


def paired(blocks: NDArray[Any]) -> Paired:
    """Pair the blocks of each list, s8 ``(lists, quads, rows, 4)``; ValueError unless rows are among ``ROWS``."""
    if blocks.shape[2] not in ROWS:
        raise ValueError(f"blocks of {blocks.shape[2]} rows; expected one of {ROWS}")
    parts = [_paired(blocks[first : first + _AT_ONCE]) for first in range(0, len(blocks), _AT_ONCE)]
    return Paired(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _paired(blocks: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Do it for a few lists; returns the fields of ``Paired``."""
    lists, quads, rows, _ = blocks.shape
    over: NDArray[Any] = _limits(blocks) > LIMIT
    alone = np.any(np.all(np.any(over, axis=4), axis=3), axis=2)
    # Of two neighbours one is rounded up and one down, and the other way round in what is left: both keep the rule.
    halves = np.where(alone[..., None, None], (blocks + np.array([0, 1, 0, 1], np.int16)) >> 1, 0).astype(np.int8)
    values = np.concatenate([blocks - halves, halves, np.zeros((lists, 1, rows, 4), np.int8)], axis=1)
    quad = np.concatenate([np.arange(quads), np.arange(quads), [0]])

    weight = np.abs(values.astype(np.int16)).reshape(lists, -1, rows, 2, 2).sum(4).max(axis=(2, 3))
    order = np.argsort(-weight, axis=1, kind="stable")[:, : (weight > 0).sum(1).max() + 1]
    pairs, flips = _pairs(_limits(_at(values, order)))
    nobody = order.shape[1] - 1
    real = (pairs[..., 0] < nobody).repeat(2, axis=1)
    members = np.take_along_axis(order, pairs.reshape(lists, -1), 1)
    bits = (_FLIPS @ [1, 2])[flips].reshape(lists, -1, 2) @ [1, 4]
    weights = _at(values, members) * (1 - 2 * _channels(bits)[:, :, None])
    return real.sum(1), quad[members[real]], bits[real], weights[real].astype(np.int8)


def _at(values: NDArray[Any], order: NDArray[Any]) -> NDArray[Any]:
    return np.take_along_axis(values, order[..., None, None], 1)


def _channels(bits: NDArray[Any]) -> NDArray[Any]:
    """0 or 1 per channel ``(…, 4)``."""
    return (bits[..., None] >> np.arange(4) & 1).astype(np.int8)


def _limits(blocks: NDArray[Any]) -> NDArray[Any]:
    """What weights of one sign add up to, or ``LIMIT`` + 1 if that is less: u8 ``(lists, blocks, 2, flips, 2 · rows)``.

    A block has two sums in each row, whose weights may be flipped in the ways of ``_FLIPS``.
    """
    neighbours = blocks.astype(np.int16).reshape(*blocks.shape[:3], 2, 1, 2) * (1 - 2 * _FLIPS)
    one, other = neighbours[..., 0], neighbours[..., 1]
    signs = np.stack([np.maximum(one, 0) + np.maximum(other, 0), np.maximum(-one, 0) + np.maximum(-other, 0)], axis=5)
    limits = np.minimum(signs, LIMIT + 1).astype(np.uint8).transpose(0, 1, 3, 4, 2, 5)
    return np.ascontiguousarray(limits).reshape(*limits.shape[:4], -1)


def _pairs(limits: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Match blocks, heaviest first, each with the heaviest that is left and fits, however flipped.

    The last block of each list is nobody: all zeros, as may be some before it, which stay out. Returns the blocks of
    each pair ``(lists, pairs, 2)`` and how their sums are flipped ``(lists, pairs, 2, 2)``. Who has no partner gets
    nobody; a list that has fewer pairs than others has pairs of nobodies.
    """
    lists, blocks = limits.shape[:2]
    word = np.dtype(f"u{limits.shape[4]}")  # all limits of a sum, which must be kept together
    above = np.frombuffer(bytes([LIMIT + 1] * word.itemsize), word)
    words = np.ascontiguousarray(limits.view(word)[..., 0].transpose(2, 3, 0, 1))  # sum, flips, list, block
    best = limits.max(axis=4).argmin(axis=3)  # flips
    left: NDArray[Any] = np.asarray(limits.any(axis=(2, 3, 4)))
    every, sums = np.arange(lists), np.arange(2)
    pairs, flips = [np.zeros((lists, 0, 2), np.int64)], [np.zeros((lists, 0, 2, 2), np.int64)]
    while left.any():
        first = np.where(left.any(1), left.argmax(1), blocks - 1)
        start = first.min()
        left[every, first] = False
        left[:, -1] = True  # nobody fits, and is found last
        of_first = words[sums, best[every, first], every[:, None], first[:, None]].T
        keeps = (words[..., start:] + of_first[:, None, :, None]) & above == 0
        second = (keeps.any(axis=1).all(axis=0) & left[:, start:]).argmax(1)
        flips_of_second = keeps[:, :, every, second].argmax(axis=1).T
        second += start
        left[every, second] = False
        left[:, -1] = False
        pairs.append(np.stack([first, second], axis=1)[:, None])
        flips.append(np.stack([best[every, first], flips_of_second], axis=1)[:, None])
    return np.concatenate(pairs, axis=1), np.concatenate(flips, axis=1)
