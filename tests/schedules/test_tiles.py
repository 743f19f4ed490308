"""Rows to tiles and back."""

import numpy as np
import oracles
import pytest

from whet.schedules.tiles import TilesSpec, from_tiles, to_tiles


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("channels", [1, 8, 16, 30, 64])
def test_both_ways(isa, tokens, channels):
    rows = np.random.default_rng(tokens).normal(size=(tokens, channels)).astype("float32")
    expected = oracles.to_tiles(rows)
    spec = TilesSpec(channels)
    (tiles,) = oracles.run(oracles.build(to_tiles, spec, isa), [rows], [(expected.shape, "float32")])
    np.testing.assert_array_equal(tiles, expected)
    (back,) = oracles.run(oracles.build(from_tiles, spec, isa), [expected], [(rows.shape, "float32")])
    np.testing.assert_array_equal(back, rows)
