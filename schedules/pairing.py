"""Orders blocks of weights so that the products of two may be added in 16 bits: an exact use of vpmaddubsw.

That instruction multiplies u8 activations by s8 weights and adds two neighbouring products in 16 bits, where they may
saturate. They can't if neither the positive nor the negative weights of a sum add up to more than 128, for activations
are at most 255. The same holds of the sum of two such results and the four weights in it. Which weights meet is decided
here, when a layer is packed: a block that breaks the rule by itself becomes two, w = a + b at the same place, and every
block gets a partner that it keeps the rule with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LIMIT = 127
"""Most that the weights of one sign in a sum may add up to; one less than could be, so that two limits fit a byte."""

_ABOVE_LIMIT = np.uint32(0x80808080)


def paired(blocks: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    """Order the blocks of each list, s8 ``(lists, quads, rows, 4)``: the 2i-th and the one after it are partners.

    Returns the number of blocks of each list ``(lists,)``, even, and for each block its quad ``(lists, most)`` and its
    weights ``(lists, most, rows, 4)``. Zeros stand only where a block has no partner.
    """
    quads = blocks.shape[1]
    alone = (_sums(blocks) > LIMIT).any(axis=(2, 3))
    # Of two neighbours one is rounded up and one down, and the other way round in what is left: both keep the rule.
    halves = np.where(alone[..., None, None], (blocks + np.array([0, 1, 0, 1], np.int16)) >> 1, 0).astype(np.int8)
    values = np.concatenate([blocks - halves, halves], axis=1)

    sums = _sums(values)
    weight = sums.max(axis=(2, 3))
    most = (weight > 0).sum(1).max()
    order = np.argsort(-weight, axis=1, kind="stable")[:, :most]
    sums = np.take_along_axis(sums, order[..., None, None], 1)
    pairs = _pairs(np.ascontiguousarray(sums.astype(np.uint8)).view(np.uint32)[..., 0])
    # Nobody is the zeros after all others.
    values = np.pad(values, ((0, 0), (0, 1), (0, 0), (0, 0)))
    order = np.pad(order, ((0, 0), (0, 1)), constant_values=2 * quads)
    members = np.take_along_axis(order, pairs.reshape(len(pairs), -1), 1)
    counts = 2 * (pairs[..., 0] < most).sum(1)
    return counts, members % quads, np.take_along_axis(values, members[..., None, None], 1)


def _sums(blocks: NDArray[np.int8]) -> NDArray[np.int16]:
    """Sums of positive and of negative weights of each sum in 16 bits: ``(lists, blocks, rows, 4)``."""
    together = blocks.astype(np.int16).reshape(*blocks.shape[:3], 2, 2)
    signs = [np.maximum(together, 0).sum(4), np.maximum(-together, 0).sum(4)]
    return np.concatenate(signs, axis=3, dtype=np.int16)


def _pairs(limits: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Match blocks, heaviest first, each with the heaviest that is left and fits: ``(lists, pairs, 2)``.

    ``limits`` ``(lists, blocks, rows)`` are their sums, a byte each; blocks of zeros stay out. Who has no partner gets
    number ``blocks``, as have both of the pairs that a list has fewer than others.
    """
    lists, blocks, _ = limits.shape
    every = np.arange(lists)
    left = limits.any(axis=2)
    of_rows = [np.ascontiguousarray(limits[:, :, row]) for row in range(limits.shape[2])]
    pairs = []
    while left.any():
        first = np.where(left.any(1), left.argmax(1), blocks - 1)
        start = first.min()
        some = left[every, first]
        left[every, first] = False
        fits = left[:, start:].copy()
        for limit in of_rows:
            fits &= (limit[:, start:] + limit[every, first, None]) & _ABOVE_LIMIT == 0
        second = start + fits.argmax(1)
        found = fits[every, second - start]
        left[every[found], second[found]] = False
        pairs.append(np.stack([np.where(some, first, blocks), np.where(found, second, blocks)], axis=1))
    return np.stack(pairs, axis=1) if pairs else np.zeros((lists, 0, 2), np.int64)
