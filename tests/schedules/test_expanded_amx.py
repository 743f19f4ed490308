"""Weights that are expanded on the way to AMX: exact for any mask, and equal to the bit to the dense kernel."""

import numpy as np
import pytest
from oracles_dense import product, random_blocks, run, to_quads
from test_dense_amx import AMX, VNNI, needs_amx

from whet.schedules import expanded_amx
from whet.schedules.dense import BLOCKS, DenseSpec, dense
from whet.schedules.gemm import Blocking

EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS["i8_expanded"])


def check(spec, weight, rows, knobs=None):
    n = spec.out_features
    got = run(spec, AMX, weight, to_quads(rows), [np.ones(n, np.float32), np.zeros(n, np.float32)], knobs)
    np.testing.assert_array_equal(got, product(weight, rows))


def activations(rng, tiles, k):
    return rng.integers(0, 256, (tiles, k, 16)).astype(np.uint8)


@needs_amx
@pytest.mark.parametrize(
    ("block", "n", "k"), [*((b, 50, 104) for b in BLOCKS["i8_expanded"]), ((1, 1), 7, 44), ((4, 4), 64, 192)]
)
def test_products_are_exact(block, n, k):
    """104 channels are 26 words, two registers of 13; 50 and 7 rows are a multiple of no register."""
    rng = np.random.default_rng(n)
    weight = random_blocks(rng, n, k, block[0], 0.4, block[1])
    weight[16:32] = 0
    for tiles in (1, 2, 3, 8, 13):
        check(DenseSpec(n, k, "i8_expanded", *block), weight, activations(rng, tiles, k))


@needs_amx
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
@pytest.mark.parametrize("k", [2048, 2176])
def test_reductions_in_chunks_of_different_length(block, k):
    """2176 channels are 34 steps in three chunks: the one that is expanded may be longer than the one in use."""
    rng = np.random.default_rng(k)
    weight = random_blocks(rng, 70, k, block[0], 0.3, block[1])
    for tiles in (1, 5, 25, 73):
        check(DenseSpec(70, k, "i8_expanded", *block), weight, activations(rng, tiles, k))


@needs_amx
@EVERY_BLOCK
@pytest.mark.parametrize("value", [127, -127, 0])
def test_full_and_empty_weights(block, value):
    spec = DenseSpec(50, 104, "i8_expanded", *block)
    check(spec, np.full((50, 104), value, np.int8), np.full((3, 104, 16), 255, np.uint8))


@needs_amx
def test_knobs_change_the_code_but_not_the_result():
    rng = np.random.default_rng(3)
    weight, rows = random_blocks(rng, 50, 104, 4, 0.5), activations(rng, 7, 104)
    for knobs in (Blocking(16, 3, 1, 1000), Blocking(48, 1, 1, 1)):
        check(DenseSpec(50, 104, "i8_expanded", 4), weight, rows, knobs)


@needs_amx
@pytest.mark.parametrize("output", ["tiles", "heads"])
def test_epilogues_give_what_vnni_gives(output):
    rng = np.random.default_rng(7)
    weight, rows = random_blocks(rng, 60, 64, 1, 0.3, 1), activations(rng, 3, 64)
    rest = [np.full(60, 1e-4, np.float32), rng.normal(size=60).astype(np.float32)]
    specs = DenseSpec(60, 64, "i8_expanded", 1, 1, output=output), DenseSpec(60, 64, "i8", output=output)
    results = [run(spec, isa, weight, to_quads(rows), rest) for spec, isa in zip(specs, (AMX, VNNI), strict=True)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_what_holds_something_is_stored():
    weight = np.zeros((8, 64), np.int8)
    weight[1, 5], weight[6, 63] = 3, -4
    spec = DenseSpec(8, 64, "i8_expanded", 1, 1)
    starts, masks, values = expanded_amx.pack(weight, spec, expanded_amx.default_knobs(spec, AMX))
    assert starts.tolist() == [0, 2]
    assert masks[0, :8].tolist() == [0, 1 << 5, 0, 0, 0, 0, 1 << 63, 0]
    assert values[:2].reshape(-1).tolist() == [3, -4]
    spec = DenseSpec(8, 64, "i8_expanded", 4, 4)
    starts, masks, values = expanded_amx.pack(weight, spec, expanded_amx.default_knobs(spec, AMX))
    assert starts.tolist() == [0, 8]
    assert masks[0, :2].tolist() == [1 << 1, 1 << 15]
    assert values[1].tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize(("isa", "k"), [(VNNI, 64), (AMX, 68)], ids=["VNNI", "17 words"])
def test_other_layers_are_refused(isa, k):
    with pytest.raises(ValueError, match="use i8_sparse or i8"):
        dense(DenseSpec(8, k, "i8_expanded"), isa)
