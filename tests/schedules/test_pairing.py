"""The order of blocks on AVX2: nothing is lost, and no sum of 16 bits overflows whatever the activations are."""

import numpy as np
import pytest

from whet.schedules.pairing import paired


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


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_kept_and_no_sum_overflows(kind, rows):
    blocks = weights(kind, rows)
    counts, quads, values = paired(blocks)
    assert (counts % 2 == 0).all()
    for of_list, count, quad, value in zip(blocks, counts, quads, values, strict=True):
        total = np.zeros(of_list.shape, np.int64)
        np.add.at(total, quad[:count], value[:count])
        np.testing.assert_array_equal(total, of_list)
        products = value[:count].astype(np.int64).reshape(count // 2, 2, rows, 2, 2) * 255
        for extreme in (np.maximum(products, 0), np.minimum(products, 0)):  # activations 255 where it hurts, else 0
            sums = extreme.sum(axis=(1, 4))
            assert sums.max(initial=0) < 1 << 15 and sums.min(initial=0) >= -(1 << 15)


def test_blocks_of_zeros_are_left_out():
    counts, _, values = paired(weights("sparse", 4))
    for count, value in zip(counts, values, strict=True):
        assert value[:count].any(axis=(1, 2)).reshape(-1, 2).any(axis=1).all()


def test_weights_of_a_usual_layer_are_hardly_more_than_before():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 768))
    weight = np.rint(weight * 127 / np.abs(weight).max(1, keepdims=True)).astype(np.int8)
    for rows, most in ((1, 1.05), (2, 1.09), (4, 1.16)):
        counts, _, _ = paired(weight.reshape(-1, rows, 192, 4).transpose(0, 2, 1, 3))
        assert counts.mean() < most * 192
