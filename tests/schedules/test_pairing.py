"""The order of blocks on AVX2: nothing is lost, and no sum of 16 bits overflows whatever the activations are."""

import numpy as np
import pytest

from whet.schedules.pairing import ROWS, paired


def weights(kind, rows):
    rng = np.random.default_rng(rows)
    shape = (6, 24, rows, 4)
    return {
        "uniform": lambda: rng.integers(-127, 128, shape),
        "normal": lambda: np.clip(rng.normal(0, 40, shape).round(), -127, 127),
        "largest": lambda: np.full(shape, 127),
        "smallest": lambda: np.full(shape, -127),
        "alternating": lambda: np.full(shape, [127, -127, 127, -127]),
        "sparse": lambda: rng.integers(-127, 128, shape) * (rng.random((6, 24, 1, 1)) < 0.2),
        "one": lambda: (np.arange(np.prod(shape)) == 402).reshape(shape) * 127,
        "zeros": lambda: np.zeros(shape),
    }[kind]().astype(np.int8)


KINDS = ("uniform", "normal", "largest", "smallest", "alternating", "sparse", "one", "zeros")


def lists_of(lists):
    """Where each list's blocks stand."""
    return np.split(np.arange(len(lists.quads)), np.cumsum(lists.counts)[:-1])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_products_are_those_of_the_weights_and_no_sum_overflows(kind, rows):
    blocks = weights(kind, rows)
    lists = paired(blocks)
    x = np.random.default_rng(1).integers(0, 256, (24, 4))
    x[::5] = 255
    assert (lists.counts % 2 == 0).all()
    for of_list, at, correction in zip(blocks, lists_of(lists), lists.corrections(), strict=True):
        flipped = lists.flips[at, None] >> np.arange(4) & 1
        weight = lists.weights[at].astype(np.int64)
        seen = np.where(flipped, 255 - x[lists.quads[at]], x[lists.quads[at]])
        got = (weight * seen[:, None]).sum(axis=(0, 2)) + correction
        np.testing.assert_array_equal(got, (of_list.astype(np.int64) * x[:, None]).sum(axis=(0, 2)))
        products = weight.reshape(len(at) // 2, 2, rows, 2, 2) * 255
        for extreme in (np.maximum(products, 0), np.minimum(products, 0)):  # activations 255 where it hurts, else 0
            sums = extreme.sum(axis=(1, 4))
            assert sums.max(initial=0) < 1 << 15 and sums.min(initial=0) >= -(1 << 15)


def test_blocks_of_zeros_are_left_out():
    lists = paired(weights("sparse", 4))
    assert lists.weights.any(axis=(1, 2)).reshape(-1, 2).any(axis=1).all()


def test_usual_weights_are_hardly_more_than_before():
    weight = np.random.default_rng(0).normal(size=(64, 768))
    weight = np.rint(weight * 127 / np.abs(weight).max(1, keepdims=True)).astype(np.int8)
    for rows, most in zip(ROWS, (1.001, 1.01, 1.02), strict=True):
        lists = paired(weight.reshape(-1, rows, 192, 4).transpose(0, 2, 1, 3))
        assert lists.counts.mean() < most * 192


def test_blocks_of_other_heights_are_refused():
    with pytest.raises(ValueError, match="blocks of 3 rows"):
        paired(np.zeros((1, 1, 3, 4), np.int8))
