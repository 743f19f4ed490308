"""Packed tokens: requests stand one after the other, 16 tokens to a tile (layouts: :mod:`whet.passes.dialect`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from whet.runtime.metadata import ALIGNMENT

TILE = 16
"""Tokens in a tile, requests in a group."""


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Uninitialised array at a 64-byte boundary, which compiled code relies on and NumPy does not promise."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT  # raw.ctypes.data costs 2 µs
    return raw[start : start + size].view(dtype).reshape(shape)


def pack(
    ids: NDArray[Any], positions: NDArray[Any], token_types: NDArray[Any] | Literal[0], lengths: NDArray[np.int64]
) -> list[NDArray[np.int32]]:
    """Arguments of ``main``.

    Args:
        ids: integers ``(tokens,)``.
        positions: integers ``(tokens,)``.
        token_types: integers ``(tokens,)``, or 0 for all.
        lengths: int64 ``(requests,)``, which sum to ``tokens``.

    Returns:
        int32 ids, positions, token types ``(tiles, 16)`` and segments ``(groups, 16, 2)``. The rest of the last tile is
        0, which every table has; unused segments have length 0.

    """
    count, requests = len(ids), len(lengths)
    tokens = aligned((3, -(-count // TILE), TILE), np.int32)
    rows = tokens.reshape(3, -1)
    rows[0, :count] = ids
    rows[1, :count] = positions
    rows[2, :count] = token_types
    rows[:, count:] = 0
    segments = aligned((-(-requests // TILE), TILE, 2), np.int32)
    flat = segments.reshape(-1, 2)
    flat[:requests, 0] = starts(lengths)
    flat[:requests, 1] = lengths
    flat[requests:] = 0
    return [*tokens, segments]


def pack_records(segments: NDArray[np.int32], records: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Addresses ``(requests, 2)`` in the shape of their segments ``(groups, 16, 2)``; 0 where there are none."""
    packed = aligned(segments.shape, np.int64)
    flat = packed.reshape(-1, 2)
    count = 0 if records is None else len(records)
    if count:
        flat[:count] = records
    flat[count:] = 0
    return packed


def unpack(tiles: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """Copy the first ``columns`` columns of ``(tiles, channels, 16)`` to the rows of ``(columns, channels)``."""
    return tiles.swapaxes(1, 2).reshape(-1, tiles.shape[1])[:columns].copy()


def split(lengths: NDArray[Any], most: int) -> Iterator[slice]:
    """Cut a batch into runs of consecutive requests of at most ``most`` tokens; a longer request stands alone."""
    first = tokens = 0
    for i, length in enumerate(lengths.tolist()):
        if tokens + length > most and i > first:
            yield slice(first, i)
            first, tokens = i, 0
        tokens += length
    if first < len(lengths):
        yield slice(first, len(lengths))


def positions_within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count 0, 1, 2 … within each request, ``(tokens,)``."""
    if len(lengths) == 1:
        return np.arange(int(lengths[0]), dtype=np.int64)
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts(lengths), lengths)


def starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """First token of each request."""
    first: NDArray[np.int64] = lengths.cumsum() - lengths
    return first
