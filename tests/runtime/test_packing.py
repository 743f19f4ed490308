"""Packing to tiles and back."""

import numpy as np
import pytest

from whet.runtime.packing import Packed, aligned, positions_within, split, tiles_of, unpack


@pytest.mark.parametrize("shape", [(0, 16), (1,), (3, 5), (2, 3, 16)])
def test_aligned(shape):
    for dtype in (np.int32, np.float32, np.int64):
        array = aligned(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0 or not array.size
        assert array.flags.c_contiguous


@pytest.mark.parametrize("lengths", [[1], [16], [17], [5, 12, 1], [3] * 17, [600]])
def test_pack(lengths):
    lengths = np.array(lengths)
    total = int(lengths.sum())
    rng = np.random.default_rng(0)
    planes = [rng.integers(1, 99, total) for _ in range(3)]
    packed = Packed(tiles_of(total), tiles_of(len(lengths)), 5, per_token=False, recorded=True)
    for array in packed.arrays:
        array[...] = 77  # what an earlier call left
    records = rng.integers(1, 99, (len(lengths), 2))
    packed.fill(*planes, lengths, records)
    *tiles, segments, addresses = packed.arrays
    for tile, plane in zip(tiles, planes, strict=True):
        assert tile.shape == (-(-total // 16), 16)
        assert tile.dtype == np.int32
        assert tile.ctypes.data % 64 == 0
        np.testing.assert_array_equal(tile.reshape(-1)[:total], plane)
        assert not tile.reshape(-1)[total:].any()
    assert segments.shape == (-(-len(lengths) // 16), 16, 2)
    flat = segments.reshape(-1, 2)
    np.testing.assert_array_equal(flat[: len(lengths), 1], lengths)
    np.testing.assert_array_equal(flat[: len(lengths), 0], np.r_[0, np.cumsum(lengths)[:-1]])
    assert not flat[len(lengths) :].any()
    np.testing.assert_array_equal(addresses.reshape(-1, 2)[: len(lengths)], records)
    assert not addresses.reshape(-1, 2)[len(lengths) :].any()
    packed.fill(*planes, lengths)
    assert not addresses.any()
    assert packed.out.shape == (segments.shape[0], 5, 16)


def test_unpack():
    tiles = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)
    rows = unpack(tiles, 20)
    assert rows.shape == (20, 3)
    for t in range(20):
        np.testing.assert_array_equal(rows[t], tiles[t // 16, :, t % 16])
    assert not np.shares_memory(rows, tiles)


def test_split_keeps_requests_whole():
    lengths = np.array([3, 3, 3, 10, 1, 1])
    assert [(s.start, s.stop) for s in split(lengths, 6)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(split(np.array([], int), 6)) == []
    assert [(s.start, s.stop) for s in split(lengths, 100)] == [(0, 6)]


def test_positions_within():
    np.testing.assert_array_equal(positions_within(np.array([2, 1, 3])), [0, 1, 0, 0, 1, 2])
    assert positions_within(np.array([], np.int64)).size == 0
