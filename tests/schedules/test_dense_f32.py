"""The float32 kernel against float64."""

import numpy as np
import pytest
from oracles_dense import EVERY_ISA, RUNNABLE, activate, clamped, product, run, to_quads

from whet.schedules.dense import DenseSpec


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (50, 67), (16, 300)])
def test_products(isa, n, k):
    rng = np.random.default_rng(n)
    spec = DenseSpec(n, k, "f32")
    weight, bias = rng.normal(size=(n, k)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    for tiles in (1, 2, 3, 4, 7, 38):
        x = rng.normal(size=(tiles, k, 16)).astype(np.float32)
        want = product(weight, x) + bias[:, None]
        np.testing.assert_allclose(run(spec, isa, weight, x, [bias]), want, rtol=1e-5, atol=2e-7 * k)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("output", ["tiles", "quads"])
def test_epilogue(isa, output):
    rng = np.random.default_rng(0)
    spec = DenseSpec(36, 20, "f32", activation="gelu", residual=True, output=output)
    weight, bias = rng.normal(0, 0.3, (36, 20)).astype(np.float32), rng.normal(size=36).astype(np.float32)
    x, residual = rng.normal(size=(4, 20, 16)).astype(np.float32), rng.normal(size=(4, 36, 16)).astype(np.float32)
    requant = np.append(rng.uniform(15, 35, 36), 100).astype(np.float32)
    want = activate("gelu", product(weight, x) + bias[:, None]) + residual
    got = run(spec, isa, weight, x, [bias, residual, *([requant] if output == "quads" else [])])
    if output == "tiles":
        np.testing.assert_allclose(got, want, atol=5e-6)
    else:
        off = got.astype(int) - to_quads(clamped(want * requant[:-1, None] + requant[-1], 0, 255, np.uint8))
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 0.01


def test_a_token_gets_the_same_bits_however_many_tiles_there_are():
    rng = np.random.default_rng(2)
    spec = DenseSpec(50, 300, "f32")
    weight, bias = rng.normal(size=(50, 300)).astype(np.float32), rng.normal(size=50).astype(np.float32)
    x = rng.normal(size=(7, 300, 16)).astype(np.float32)
    for isa in RUNNABLE:
        every = run(spec, isa, weight, x, [bias])
        for tiles in range(1, 7):
            np.testing.assert_array_equal(run(spec, isa, weight, x[:tiles], [bias]), every[:tiles])


def test_instruction_sets_agree():
    rng = np.random.default_rng(1)
    spec = DenseSpec(50, 67, "f32")
    weight, bias = rng.normal(size=(50, 67)).astype(np.float32), rng.normal(size=50).astype(np.float32)
    x = rng.normal(size=(7, 67, 16)).astype(np.float32)
    first, *others = [run(spec, isa, weight, x, [bias]) for isa in RUNNABLE]
    for other in others:
        np.testing.assert_allclose(first, other, atol=1e-5)
