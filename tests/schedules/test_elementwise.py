"""Activations, sums and quantisation of tiles."""

import numpy as np
import oracles
import pytest

from whet.schedules import bfloat16
from whet.schedules.elementwise import ActivateSpec, AddSpec, QuantizeSpec, elementwise


def tiles_of(tokens, channels, scale=3.0):
    rng = np.random.default_rng(tokens)
    return oracles.to_tiles(rng.normal(0, scale, (tokens, channels)).astype("float32"))


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("kind", sorted(oracles.ACTIVATIONS))
def test_activate(isa, kind):
    x = tiles_of(40, 9)
    (out,) = oracles.run(oracles.build(elementwise, ActivateSpec(9, kind), isa), [x], [(x.shape, "float32")])
    np.testing.assert_allclose(out, oracles.ACTIVATIONS[kind](x.astype("float64")), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_add(isa):
    x, y = tiles_of(40, 9), tiles_of(41, 9)
    (out,) = oracles.run(oracles.build(elementwise, AddSpec(9), isa), [x, y], [(x.shape, "float32")])
    np.testing.assert_array_equal(out, x + y)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_quantize_static(isa, scale):
    x, requant = tiles_of(50, 24, scale), oracles.requant(np.random.default_rng(1), 24, 42, 117)
    kernel = oracles.build(elementwise, QuantizeSpec(24), isa)
    (quads,) = oracles.run(kernel, [x, requant], [((4, 6, 16, 4), "uint8")])
    exact = oracles.from_tiles(x).astype("float64")
    np.testing.assert_array_equal(oracles.from_quads(quads), oracles.quantize(exact, requant))


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("shift", [-20, 0, 20])
def test_quantize_per_token(isa, shift):
    x = tiles_of(50, 24) + np.float32(shift)
    x[0, :, 3] = 0
    kernel = oracles.build(elementwise, QuantizeSpec(24, "per_token"), isa)
    quads, params = oracles.run(kernel, [x], [((4, 6, 16, 4), "uint8"), ((4, 2, 16), "float32")])
    rows = oracles.from_tiles(x).astype("float64")
    scale, zero = oracles.token_params(rows)
    got_scale, got_shift = oracles.from_tiles(params).T
    np.testing.assert_allclose(got_scale, scale, rtol=1e-6)
    np.testing.assert_allclose(got_shift, scale * zero, rtol=1e-6)
    back = oracles.from_quads(quads) * got_scale[:, None] - got_shift[:, None]
    assert (np.abs(back - rows) <= 0.51 * scale[:, None]).all()


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_round_to_bf16(isa, scale):
    x = tiles_of(50, 24, scale)
    (pairs,) = oracles.run(oracles.build(elementwise, QuantizeSpec(24, "bf16"), isa), [x], [((4, 12, 16, 2), "uint16")])
    np.testing.assert_array_equal(oracles.from_pairs(pairs), bfloat16.rounded(oracles.from_tiles(x)))


def test_refusals():
    with pytest.raises(ValueError, match="kind is 'swish'"):
        ActivateSpec(8, "swish")
    with pytest.raises(ValueError, match="channels is 6"):
        QuantizeSpec(6)
    with pytest.raises(ValueError, match="mode is 'none'"):
        QuantizeSpec(8, "none")
