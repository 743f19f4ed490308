"""The AMX kernel: exact, and equal to the bit to what AVX-512 VNNI computes."""

import ctypes

import numpy as np
import pytest
from oracles_dense import product, run, to_quads

from whet.runtime.cpu import cpu_flags
from whet.schedules import dense_amx
from whet.schedules.dense import DenseSpec
from whet.schedules.gemm import Blocking
from whet.schedules.isa import ISAS

AMX, VNNI = ISAS["amx_int8"], ISAS["avx512_vnni"]
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18


def granted():
    """Whether the CPU has AMX and the operating system lets this process use its registers."""
    if not cpu_flags().issuperset(AMX.cpu_flags):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0


needs_amx = pytest.mark.skipif(not granted(), reason="no AMX here, or the kernel does not grant it")


def check(spec, weight, rows, knobs=None):
    assert dense_amx.supports(spec, AMX)
    n = spec.out_features
    got = run(spec, AMX, weight, to_quads(rows), [np.ones(n, np.float32), np.zeros(n, np.float32)], knobs)
    np.testing.assert_array_equal(got, product(weight, rows))


@needs_amx
@pytest.mark.parametrize(("n", "k"), [(64, 128), (50, 104), (7, 44), (1, 64)])
def test_products_are_exact(n, k):
    rng = np.random.default_rng(n)
    weight = rng.integers(-127, 128, (n, k)).astype(np.int8)
    for tiles in (1, 2, 3, 8, 13, 38):
        check(DenseSpec(n, k, "i8"), weight, rng.integers(0, 256, (tiles, k, 16)).astype(np.uint8))


@needs_amx
@pytest.mark.parametrize("k", [2048, 2176])
def test_reductions_in_chunks_over_several_spans_of_tokens(k):
    """Weights exceed the first-level cache, activations the second; 2176 channels are 34 steps, in three chunks."""
    rng = np.random.default_rng(k)
    weight = rng.integers(-127, 128, (40, k)).astype(np.int8)
    spec = DenseSpec(40, k, "i8")
    for tiles in (1, 2, 23, 24, 25, 73):
        check(spec, weight, rng.integers(0, 256, (tiles, k, 16)).astype(np.uint8))


@needs_amx
@pytest.mark.parametrize("value", [127, -127, 0])
def test_extreme_values(value):
    check(DenseSpec(50, 104, "i8"), np.full((50, 104), value, np.int8), np.full((3, 104, 16), 255, np.uint8))


@needs_amx
def test_knobs_change_the_code_but_not_the_result():
    rng = np.random.default_rng(3)
    weight, rows = (
        rng.integers(-127, 128, (50, 104)).astype(np.int8),
        rng.integers(0, 256, (7, 104, 16)).astype(np.uint8),
    )
    for knobs in (Blocking(16, 3, 1, 1000), Blocking(48, 1, 1, 1)):
        check(DenseSpec(50, 104, "i8"), weight, rows, knobs)


@needs_amx
@pytest.mark.parametrize(
    "spec",
    [
        DenseSpec(60, 64, "i8", activation="gelu", residual=True),
        DenseSpec(60, 64, "i8", activation="gelu", per_token=True, output="quads"),
        DenseSpec(60, 64, "i8", output="heads"),
    ],
    ids=str,
)
def test_epilogues_give_what_vnni_gives(spec):
    rng = np.random.default_rng(7)
    weight, rows = rng.integers(-127, 128, (60, 64)).astype(np.int8), rng.integers(0, 256, (3, 64, 16)).astype(np.uint8)
    rest = [np.full(60, 1e-4, np.float32), rng.normal(size=60).astype(np.float32)]
    if spec.per_token:
        rest += [weight.sum(1).astype(np.float32), rng.uniform(1, 2, (3, 2, 16)).astype(np.float32)]
    if spec.residual:
        rest.append(rng.normal(size=(3, 60, 16)).astype(np.float32))
    if spec.output == "quads":
        rest.append(np.array([30, 50], np.float32))
    results = [run(spec, isa, weight, to_quads(rows), rest) for isa in (AMX, VNNI)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "spec", [DenseSpec(8, 68, "i8"), DenseSpec(8, 64, "i8_sparse"), DenseSpec(8, 64, "f32")], ids=str
)
def test_other_layers_are_left_to_the_vector_kernels(spec):
    """68 channels are 17 quads, which divide into no tile register worth loading."""
    assert not dense_amx.supports(spec, AMX)


def test_too_many_tile_registers_are_refused():
    with pytest.raises(ValueError, match="8 tile registers"):
        dense_amx.kernel(DenseSpec(8, 64, "i8"), AMX, Blocking(48, 2, 1, 1))
