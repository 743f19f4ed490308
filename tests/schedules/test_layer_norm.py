"""Layer norm, plain and quantised, against float64."""

import numpy as np
import oracles
import pytest

from whet.schedules import bfloat16
from whet.schedules.layer_norm import LayerNormSpec, layer_norm

EPS = 1e-12


def parameters(rng, channels):
    return rng.normal(1, 0.3, channels).astype("float32"), rng.normal(0, 0.5, channels).astype("float32")


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 4), (16, 30), (17, 312), (40, 384), (100, 768)])
def test_plain(isa, tokens, channels):
    rng = np.random.default_rng(tokens)
    x = rng.normal(3, 2, (tokens, channels)).astype("float32")
    gamma, beta = parameters(rng, channels)
    kernel = oracles.build(layer_norm, LayerNormSpec(channels, EPS), isa)
    tiles = oracles.to_tiles(x)
    (h,) = oracles.run(kernel, [tiles, gamma, beta], [(tiles.shape, "float32")])
    assert np.isfinite(h).all()
    np.testing.assert_allclose(oracles.from_tiles(h, tokens), oracles.layer_norm(x, gamma, beta, EPS), atol=1e-5)


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_large_mean_keeps_its_digits(isa):
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(0, 0.1, (16, 384))).astype("float32")
    gamma, beta = np.ones(384, "float32"), np.zeros(384, "float32")
    kernel = oracles.build(layer_norm, LayerNormSpec(384, EPS), isa)
    tiles = oracles.to_tiles(x)
    (h,) = oracles.run(kernel, [tiles, gamma, beta], [(tiles.shape, "float32")])
    np.testing.assert_allclose(oracles.from_tiles(h), oracles.layer_norm(x, gamma, beta, EPS), atol=3e-3)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("zero", [0.0, 128.0, 255.0])
def test_static(isa, zero):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, (37, 64)).astype("float32")
    gamma, beta = parameters(rng, 64)
    requant = oracles.requant(rng, 64, 40, zero)
    kernel = oracles.build(layer_norm, LayerNormSpec(64, EPS, "static"), isa)
    tiles = oracles.to_tiles(x)
    h, quads = oracles.run(kernel, [tiles, gamma, beta, requant], [(tiles.shape, "float32"), ((3, 16, 16, 4), "uint8")])
    y = oracles.layer_norm(x, gamma, beta, EPS)
    np.testing.assert_allclose(oracles.from_tiles(h, 37), y, atol=1e-5)
    np.testing.assert_array_equal(oracles.from_quads(quads), oracles.quantize(oracles.from_tiles(h), requant))
    got = oracles.from_quads(quads, 37).astype(int)
    assert np.abs(got - oracles.quantize(y, requant)).max() <= 1
    assert got.min() == 0 or zero > 128
    assert got.max() == 255 or zero < 128


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_bf16(isa):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, (37, 64)).astype("float32")
    gamma, beta = parameters(rng, 64)
    kernel = oracles.build(layer_norm, LayerNormSpec(64, EPS, "bf16"), isa)
    tiles = oracles.to_tiles(x)
    h, pairs = oracles.run(kernel, [tiles, gamma, beta], [(tiles.shape, "float32"), ((3, 32, 16, 2), "uint16")])
    np.testing.assert_allclose(oracles.from_tiles(h, 37), oracles.layer_norm(x, gamma, beta, EPS), atol=1e-5)
    np.testing.assert_array_equal(oracles.from_pairs(pairs), bfloat16.rounded(oracles.from_tiles(h)))


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_per_token(isa):
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, (37, 64)).astype("float32")
    gamma, beta = parameters(rng, 64)
    beta[:] = np.linspace(-0.2, 4, 64)
    kernel = oracles.build(layer_norm, LayerNormSpec(64, EPS, "per_token"), isa)
    tiles = oracles.to_tiles(x)
    h, quads, params = oracles.run(
        kernel,
        [tiles, gamma, beta],
        [(tiles.shape, "float32"), ((3, 16, 16, 4), "uint8"), ((3, 2, 16), "float32")],
    )
    y = oracles.from_tiles(h).astype("float64")
    scale, zero = oracles.token_params(y)
    got_scale, got_shift = oracles.from_tiles(params).T
    np.testing.assert_allclose(got_scale, scale, rtol=1e-6)
    np.testing.assert_allclose(got_shift, scale * zero, rtol=1e-6, atol=1e-6)
    back = oracles.from_quads(quads) * got_scale[:, None] - got_shift[:, None]
    assert (np.abs(back - y) <= 0.501 * scale[:, None] + 1e-6).all()


@pytest.mark.parametrize("quantize", ["none", "static", "per_token"])
def test_instruction_sets_agree(quantize):
    rng = np.random.default_rng(3)
    tiles = oracles.to_tiles(rng.normal(0, 2, (50, 100)).astype("float32"))
    inputs = [tiles, *parameters(rng, 100)] + [oracles.requant(rng, 100, 30, 120)] * (quantize == "static")
    outputs = [(tiles.shape, "float32"), ((4, 25, 16, 4), "uint8"), ((4, 2, 16), "float32")]
    outputs = outputs[: {"none": 1, "static": 2, "per_token": 3}[quantize]]
    spec = LayerNormSpec(100, EPS, quantize)
    first, *others = [oracles.run(oracles.build(layer_norm, spec, isa), inputs, outputs) for isa in oracles.several()]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_channels_that_do_not_fill_quads():
    with pytest.raises(ValueError, match="channels is 30"):
        LayerNormSpec(30, EPS, "static")
