"""Pooling and normalisation against NumPy; the place of a request in the batch must not matter."""

import numpy as np
import oracles
import pytest

from whet.schedules.pool import NormalizeSpec, PoolSpec, normalize, pool

LENGTHS = [1, 2, 15, 16, 17, 31, 3, 64, 100, 5, 1, 1, 8, 8, 8, 9, 40, 7]


def pooled(rows, mode):
    return {"mean": rows.mean, "max": rows.max}[mode](axis=0)


def run_pool(isa, mode, x, segments):
    tiles = oracles.to_tiles(x)
    tiles[tiles == 0] = 1e30  # lanes past the end hold anything
    kernel = oracles.build(pool, PoolSpec(x.shape[1], mode), isa)
    (out,) = oracles.run(kernel, [tiles, segments], [((len(segments), x.shape[1], 16), "float32")])
    return oracles.from_tiles(out)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("channels", [3, 16, 40, 384])
def test_pool(isa, mode, channels):
    rng = np.random.default_rng(channels)
    segments = oracles.segments_of(LENGTHS, gaps=[0, 4])
    x = rng.normal(1, 2, (sum(LENGTHS), channels)).astype("float32")
    got = run_pool(isa, mode, x, segments)
    used = dict(oracles.requests_of(segments))
    for i, row in enumerate(got):
        expected = pooled(x[used[i]].astype("float64"), mode) if i in used else np.zeros(channels)
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_request_alone_gives_the_same_bits_on_every_instruction_set(mode):
    rng = np.random.default_rng(0)
    segments = oracles.segments_of(LENGTHS)
    x = rng.normal(1, 2, (sum(LENGTHS), 20)).astype("float32")
    together = [run_pool(isa, mode, x, segments) for isa in oracles.several()]
    for other in together[1:]:
        np.testing.assert_array_equal(together[0], other)
    for i, tokens in oracles.requests_of(segments):
        alone = run_pool("avx2", mode, x[tokens], oracles.segments_of([tokens.stop - tokens.start]))
        np.testing.assert_array_equal(alone[0], together[0][i])


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("channels", [1, 6, 384])
def test_normalize(isa, channels):
    rng = np.random.default_rng(channels)
    x = rng.normal(1, 2, (32, channels)).astype("float32")
    x[3] = 0
    kernel = oracles.build(normalize, NormalizeSpec(channels), isa)
    (out,) = oracles.run(kernel, [oracles.to_tiles(x)], [((2, channels, 16), "float32")])
    norms = np.linalg.norm(x.astype("float64"), axis=1, keepdims=True)
    np.testing.assert_allclose(oracles.from_tiles(out), x / np.maximum(norms, 1e-12), atol=3e-7)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'median'"):
        PoolSpec(8, "median")
