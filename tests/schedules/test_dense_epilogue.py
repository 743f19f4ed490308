"""Everything after the multiplications, and that all instruction sets agree on it to the bit."""

import numpy as np
import pytest
from oracles_dense import EVERY_ISA, RUNNABLE, activate, clamped, product, random_blocks, run, to_quads

from whet.schedules.dense import DenseSpec
from whet.schedules.dense_spec import HEADS

N, K, TILES = 36, 32, 3
SPECS = [
    *(DenseSpec(N, K, "i8_sparse", 4, activation=a) for a in ("none", "gelu", "gelu_tanh", "relu", "tanh")),
    DenseSpec(N, K, "i8", activation="gelu", residual=True),
    DenseSpec(N, K, "i8", per_token=True),
    DenseSpec(N, K, "i8", activation="gelu", output="quads"),
    DenseSpec(N, K, "i8", output="heads"),
    DenseSpec(N, K, "i8_sparse", 1, output="quads", per_token=True),
    DenseSpec(N, K, "i8_sparse", 2, activation="relu", residual=True, output="quads"),
    DenseSpec(N, K, "i8_sparse", 8, output="heads", per_token=True),
    DenseSpec(N, K, "i8_sparse", 4, 1, output="heads", per_token=True),
    DenseSpec(N, K, "i8_sparse", 16, residual=True, output="heads"),
    DenseSpec(N, K, "i8_sparse", 4, output="values", per_token=True),
]


def case(spec):
    """Weight, activations as rows, and the remaining arguments by name, in the order that kernels take them."""
    rng = np.random.default_rng(5)
    n, k = spec.out_features, spec.in_features
    heads = spec.output in HEADS
    weight = random_blocks(rng, n, k, spec.block_rows, 0.7)
    rest = {
        "scale": rng.uniform(0.5, 1, n).astype(np.float32) * np.float32(1e-3 if heads else 4e-5),
        "bias": rng.normal(0, 20 if heads else 1, n).astype(np.float32),
    }
    if spec.per_token:
        token_scale = rng.uniform(0.5, 2, (TILES, 16)).astype(np.float32)
        zero = rng.integers(0, 256, (TILES, 16))
        rest["row_sums"] = weight.sum(1).astype(np.float32)
        rest["token_params"] = np.stack([token_scale, token_scale * zero], 1).astype(np.float32)
    if spec.residual:
        rest["residual"] = rng.normal(0, 2, (TILES, n, 16)).astype(np.float32)
    if spec.output == "quads":
        rest["requant"] = np.append(rng.uniform(30, 70, n), 117).astype(np.float32)
    return weight, rng.integers(0, 256, (TILES, k, 16)).astype(np.uint8), rest


def values(spec, weight, rows, rest):
    """The layer's float result in float64."""
    acc = product(weight, rows).astype(np.float64)
    column = {name: rest[name].astype(np.float64)[:, None] for name in ("scale", "bias", "row_sums") if name in rest}
    if spec.per_token:
        s, z = (rest["token_params"][:, i, None].astype(np.float64) for i in (0, 1))
        acc = acc * s - column["row_sums"] * z
    y = activate(spec.activation, acc * column["scale"] + column["bias"])
    return y + rest["residual"] if spec.residual else y


def expected(spec, y, rest):
    if spec.output == "tiles":
        return [y]
    if spec.output == "quads":
        return [to_quads(clamped(y * rest["requant"][:-1, None] + rest["requant"][-1], 0, 255, np.uint8))]
    convert = {
        "q": lambda q: to_quads(clamped(q + 128, 0, 255, np.uint8)),
        "k": lambda k: to_quads(clamped(k, -128, 127, np.int8)),
        "v": lambda v: clamped(v, -128, 127, np.int8),
    }
    parts = HEADS[spec.output]
    return [convert[part](x) for part, x in zip(parts, np.split(y, len(parts), axis=1), strict=True)]


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_epilogue(spec, isa):
    weight, rows, rest = case(spec)
    got = run(spec, isa, weight, to_quads(rows), rest.values())
    for have, want in zip(
        got if isinstance(got, list) else [got], expected(spec, values(spec, weight, rows, rest), rest), strict=True
    ):
        if spec.output == "tiles":
            np.testing.assert_allclose(have, want, rtol=3e-6, atol=3e-6)
        else:
            off = np.abs(have.astype(int) - want.astype(int))
            assert off.max() <= 1
            assert (off > 0).mean() < 0.01
            assert len(np.unique(want)) > 50, "the test data is degenerate"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_instruction_sets_agree_to_the_bit(spec):
    weight, rows, rest = case(spec)
    results = [run(spec, isa, weight, to_quads(rows), rest.values()) for isa in RUNNABLE]
    for isa, other in zip(RUNNABLE[1:], results[1:], strict=True):
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{RUNNABLE[0].name} and {isa.name}")


def test_quantised_outputs_saturate_and_round_halves_to_even():
    spec = DenseSpec(4, 4, "i8", output="quads")
    weight = np.eye(4, dtype=np.int8)
    rows = np.zeros((1, 4, 16), np.uint8)
    rows[0, 0] = [0, 1, 2, 3, 4, 5, 6, 7, 255, 254, 253, 128, 129, 130, 131, 132]
    one, big = np.ones(4, np.float32), np.array([0, 1e9, -1e9, 0], np.float32)
    for isa in RUNNABLE:
        got = run(spec, isa, weight, to_quads(rows), [one, big, np.array([0.5, 0.5, 0.5, 0.5, 0], np.float32)])
        np.testing.assert_array_equal(got[0, 0, :, 0], np.rint(rows[0, 0] / 2))
        assert (got[0, 0, :, 1] == 255).all()
        assert (got[0, 0, :, 2:] == 0).all()


def test_heads_saturate():
    """Q as uint8 around 128, K and V as int8."""
    weight, rows = np.zeros((12, 4), np.int8), np.zeros((1, 4, 16), np.uint8)
    bias = np.tile(np.array([1e9, -1e9, 130, -0.5], np.float32), 3)
    for isa in RUNNABLE:
        q, k, v = run(DenseSpec(12, 4, "i8", output="heads"), isa, weight, to_quads(rows), [np.ones(12, "f4"), bias])
        assert (q == [255, 0, 255, 128]).all()
        assert (k == [127, -128, 127, 0]).all()
        assert (v == np.array([127, -128, 127, 0])[:, None]).all()
