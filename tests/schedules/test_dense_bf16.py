"""The bfloat16 kernels against float64 products of the same rounded values."""

import numpy as np
import pytest
from oracles_dense import activate, product, run, runnable, to_quads

from whet.runtime.cpu import cpu_flags, request_amx
from whet.schedules import bfloat16, dense_amx
from whet.schedules.dense import DenseSpec, dense
from whet.schedules.gemm import Blocking
from whet.schedules.isa import BF16_ISAS, ISAS

AMX = BF16_ISAS["amx_bf16"]
EVERY_ISA = [runnable(isa) for isa in BF16_ISAS.values()]
RUNNABLE = [isa for isa in BF16_ISAS.values() if cpu_flags().issuperset(isa.cpu_flags)]


@pytest.fixture(autouse=True)
def amx_registers():
    if AMX in RUNNABLE and (refusal := request_amx()):
        pytest.skip(refusal)


def case(n, k, tiles):
    rng = np.random.default_rng(n)
    weight, x = (bfloat16.rounded(rng.normal(size=s).astype(np.float32)) for s in ((n, k), (tiles, k, 16)))
    return weight, x, rng.normal(size=n).astype(np.float32)


def run_bf16(spec, isa, weight, x, rest, knobs=None):
    return run(spec, isa, bfloat16.to_bits(weight), to_quads(bfloat16.to_bits(x), 2), rest, knobs)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (50, 68), (64, 128), (40, 1088)])
def test_products(isa, n, k):
    """68 channels are 34 pairs, which AMX leaves to the vector kernel; 1088 take several chunks of weights there."""
    weight, x, bias = case(n, k, 38)
    want = product(weight, x) + bias[:, None]
    for tiles in (1, 2, 3, 7, 38):
        got = run_bf16(DenseSpec(n, k, "bf16"), isa, weight, x[:tiles], [bias])
        np.testing.assert_allclose(got, want[:tiles], rtol=1e-5, atol=2e-7 * k)


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_a_token_gets_the_same_bits_however_many_tiles_there_are(isa):
    weight, x, bias = case(50, 544, 75)
    spec = DenseSpec(50, 544, "bf16")
    every = run_bf16(spec, isa, weight, x, [bias])
    for tiles in (1, 2, 3, 4, 5, 6, 7, 50):
        np.testing.assert_array_equal(run_bf16(spec, isa, weight, x[:tiles], [bias]), every[:tiles])


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_pairs_are_the_rounded_tiles(isa):
    weight, x, bias = case(36, 64, 4)
    residual = np.random.default_rng(1).normal(size=(4, 36, 16)).astype(np.float32)
    tiles, pairs = (
        run_bf16(DenseSpec(36, 64, "bf16", residual=True, output=output), isa, weight, x, [bias, residual])
        for output in ("tiles", "pairs")
    )
    np.testing.assert_allclose(tiles, product(weight, x) + bias[:, None] + residual, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pairs, to_quads(bfloat16.to_bits(tiles), 2))


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_heads_are_the_rounded_tiles(isa):
    weight, x, bias = case(48, 64, 3)
    tiles, (q, k, v) = (
        run_bf16(DenseSpec(48, 64, "bf16", output=output), isa, weight, x, [bias]) for output in ("tiles", "heads")
    )
    bits = np.split(bfloat16.to_bits(tiles), 3, axis=1)
    np.testing.assert_array_equal(q, to_quads(bits[0], 2))
    np.testing.assert_array_equal(k, to_quads(bits[1], 2))
    np.testing.assert_array_equal(v, bits[2])


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_activations(isa, kind):
    weight, x, bias = case(36, 64, 4)
    want = activate(kind, product(weight / 8, x) + bias[:, None])
    tiles, pairs = (
        run_bf16(DenseSpec(36, 64, "bf16", activation=kind, output=output), isa, weight / 8, x, [bias])
        for output in ("tiles", "pairs")
    )
    np.testing.assert_allclose(tiles, want, atol=5e-6)
    np.testing.assert_allclose(bfloat16.from_bits(pairs), to_quads(want, 2), rtol=2**-8, atol=2e-4)


@pytest.mark.skipif(AMX not in RUNNABLE, reason="no AMX here")
def test_knobs_of_amx_change_the_code_but_not_the_result():
    weight, x, bias = case(50, 128, 7)
    spec = DenseSpec(50, 128, "bf16")
    assert dense_amx.supports(spec, AMX)
    first, *others = [
        run_bf16(spec, AMX, weight, x, [bias], k) for k in (None, Blocking(16, 3, 1, 1000), Blocking(48, 1, 1, 1))
    ]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_rounding_is_to_nearest_even():
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0.0], np.float32)
    np.testing.assert_array_equal(bfloat16.rounded(values), [1, 1, 1 + 2**-6, 1 + 2**-7, -1, 0.0])


def test_other_instruction_sets_and_layers_are_refused():
    for isa in ISAS.values():
        with pytest.raises(ValueError, match=f"{isa.name} has no products of bfloat16; expected one of amx_bf16, "):
            dense(DenseSpec(8, 64, "bf16"), isa)
    with pytest.raises(ValueError, match="avx512_bf16 is for products of bfloat16"):
        dense(DenseSpec(8, 64, "i8"), BF16_ISAS["avx512_bf16"])
    with pytest.raises(ValueError, match="in_features is 3; bf16 kernels need a multiple of 2"):
        DenseSpec(8, 3, "bf16")
    with pytest.raises(ValueError, match="output is 'pairs'"):
        DenseSpec(8, 64, "i8", output="pairs")
    with pytest.raises(ValueError, match="output is 'quads'"):
        DenseSpec(8, 64, "bf16", output="quads")
