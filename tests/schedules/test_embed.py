"""Embedding against a sum of table rows and float64 layer norm."""

import numpy as np
import oracles
import pytest

from whet.schedules import bfloat16
from whet.schedules.embed import EmbedSpec, embed

EPS = 1e-12


def data(rng, spec, tokens):
    ids = [rng.integers(0, n, (-(-tokens // 16), 16)).astype("int32") for n in (spec.vocab, spec.positions, spec.types)]
    ids[0].reshape(-1)[:2] = 0, spec.vocab - 1
    word = rng.normal(0, 1, (spec.vocab, spec.channels)).astype("float32")
    tables = [rng.normal(0, 1, (n, spec.channels)).astype("float32") for n in (spec.positions, spec.types)]
    if spec.table == "i8":
        words = [
            rng.integers(-127, 128, word.shape).astype("int8"),
            rng.uniform(0.005, 0.02, spec.vocab).astype("float32"),
        ]
        word = words[0] * words[1][:, None]
    else:
        words = [word]
    gamma, beta = (
        rng.normal(1, 0.3, spec.channels).astype("float32"),
        rng.normal(0, 0.5, spec.channels).astype("float32"),
    )
    total = word[ids[0].reshape(-1)] + tables[1][ids[2].reshape(-1)] + tables[0][ids[1].reshape(-1)]
    return [*ids, *words, *tables, gamma, beta], oracles.layer_norm(total, gamma, beta, EPS)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("table", ["f32", "i8"])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (16, 30), (33, 312), (70, 768)])
def test_plain(isa, table, tokens, channels):
    spec = EmbedSpec(99, 40, 2, channels, EPS, table)
    inputs, expected = data(np.random.default_rng(tokens), spec, tokens)
    (h,) = oracles.run(oracles.build(embed, spec, isa), inputs, [((-(-tokens // 16), channels, 16), "float32")])
    np.testing.assert_allclose(oracles.from_tiles(h), expected, atol=1e-5)


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_static(isa):
    spec = EmbedSpec(50, 20, 1, 48, EPS, "i8", "static")
    inputs, expected = data(np.random.default_rng(1), spec, 20)
    requant = oracles.requant(np.random.default_rng(2), 48, 50, 130)
    h, quads = oracles.run(
        oracles.build(embed, spec, isa), [*inputs, requant], [((2, 48, 16), "float32"), ((2, 12, 16, 4), "uint8")]
    )
    np.testing.assert_allclose(oracles.from_tiles(h), expected, atol=1e-5)
    np.testing.assert_array_equal(oracles.from_quads(quads), oracles.quantize(oracles.from_tiles(h), requant))


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_bf16(isa):
    spec = EmbedSpec(50, 20, 1, 48, EPS, "f32", "bf16")
    inputs, expected = data(np.random.default_rng(1), spec, 20)
    h, pairs = oracles.run(
        oracles.build(embed, spec, isa), inputs, [((2, 48, 16), "float32"), ((2, 24, 16, 2), "uint16")]
    )
    np.testing.assert_allclose(oracles.from_tiles(h), expected, atol=1e-5)
    np.testing.assert_array_equal(oracles.from_pairs(pairs), bfloat16.rounded(oracles.from_tiles(h)))


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_per_token(isa):
    spec = EmbedSpec(50, 20, 1, 48, EPS, "f32", "per_token")
    inputs, expected = data(np.random.default_rng(2), spec, 20)
    h, quads, params = oracles.run(
        oracles.build(embed, spec, isa),
        inputs,
        [((2, 48, 16), "float32"), ((2, 12, 16, 4), "uint8"), ((2, 2, 16), "float32")],
    )
    scale, shift = oracles.from_tiles(params).T[:, :, None]
    np.testing.assert_allclose(oracles.from_quads(quads) * scale - shift, expected, atol=0.51 * scale.max())
    np.testing.assert_allclose(oracles.from_tiles(h), expected, atol=1e-5)


def test_instruction_sets_agree():
    spec = EmbedSpec(50, 20, 2, 44, EPS, "i8", "static")
    inputs, _ = data(np.random.default_rng(3), spec, 40)
    inputs.append(oracles.requant(np.random.default_rng(4), 44, 50, 130))
    outputs = [((3, 44, 16), "float32"), ((3, 11, 16, 4), "uint8")]
    first, *others = [oracles.run(oracles.build(embed, spec, isa), inputs, outputs) for isa in oracles.several()]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
