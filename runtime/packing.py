"""Packed tokens: requests stand one after the other, 16 tokens to a tile (layouts: :mod:`whet.passes.dialect`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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


class Packed:
    """What ``main`` takes of requests and what it writes: arrays for calls of so many tiles and groups.

    ``tokens`` int32 ``(3, tiles, 16)`` are ids, positions and token types; then segments int32 ``(groups, 16, 2)``,
    perhaps records, the addresses int64 of the same shape, and ``out`` float32 ``(tiles or groups, channels, 16)``.
    """

    def __init__(self, tiles: int, groups: int, channels: int, *, per_token: bool, recorded: bool) -> None:
        self._tokens = aligned((3, tiles, TILE), np.int32)
        self._segments = aligned((groups, TILE, 2), np.int32)
        self._records = aligned((groups, TILE, 2), np.int64) if recorded else None
        self.out: NDArray[np.float32] = aligned((tiles if per_token else groups, channels, TILE), np.float32)

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """In the order in which ``main`` takes them, ``out`` excepted."""
        return [*self._tokens, self._segments, *([] if self._records is None else [self._records])]

    def fill(
        self,
        ids: NDArray[Any],
        positions: NDArray[Any] | None,
        token_types: NDArray[Any] | None,
        lengths: NDArray[np.int64],
        records: NDArray[np.int64] | None = None,
    ) -> None:
        """Write requests; there are as many tiles and groups as they fill.

        Args:
            ids: integers ``(tokens,)``.
            positions: integers ``(tokens,)``; 0, 1, 2 … within each request if None.
            token_types: integers ``(tokens,)``; all 0 if None.
            lengths: int64 ``(requests,)``, which sum to ``tokens``.
            records: addresses ``(requests, 2)``; 0 where there are none, or for all if None.

        The rest of the last tile becomes 0, which every table has, and the length of unused segments.

        """
        count, requests = len(ids), len(lengths)
        rows = self._tokens.reshape(3, -1)
        rows[0, :count] = ids
        rows[1, :count] = positions_within(lengths) if positions is None else positions
        rows[2, :count] = 0 if token_types is None else token_types
        rows[:, count:] = 0
        segments = self._segments.reshape(-1, 2)
        segments[:requests, 0] = 0 if requests == 1 else starts(lengths)
        segments[:requests, 1] = lengths
        segments[requests:] = 0
        if self._records is not None:
            flat = self._records.reshape(-1, 2)
            flat[:requests] = 0 if records is None else records
            flat[requests:] = 0


def tiles_of(count: int) -> int:
    """Tiles that so many tokens fill, or groups that so many requests fill."""
    return -(-count // TILE)


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
