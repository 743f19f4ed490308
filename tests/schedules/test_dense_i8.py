"""Integer kernels, dense and block-sparse: exact products over shapes, blocks and token counts."""

import numpy as np
import pytest
from oracles_dense import EVERY_ISA, product, random_blocks, run, to_quads

from whet.schedules import paired_i8, sparse_channel_i8, sparse_i8, sparse_low_i8
from whet.schedules.dense import BLOCKS, DenseSpec, dense
from whet.schedules.gemm import Blocking
from whet.schedules.isa import ISAS
from whet.schedules.sparse_i8 import SparseBlocking

FAMILIES = [("i8", (4, 4)), *(("i8_sparse", block) for block in BLOCKS["i8_sparse"])]
TILES = (1, 2, 3, 5, 6, 7, 8, 13, 38)  # up to 608 tokens


def check(spec, isa, weight, rows, knobs=None):
    n = spec.out_features
    got = run(spec, isa, weight, to_quads(rows), [np.ones(n, np.float32), np.zeros(n, np.float32)], knobs)
    want = product(weight, rows)
    assert np.abs(want).max() < 1 << 24, "the test cannot see more than float32's integers"
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("weight", "block"), FAMILIES)
def test_products_are_exact_for_any_number_of_tokens(isa, weight, block):
    rng = np.random.default_rng(block[0])
    spec = DenseSpec(50, 68, weight, *block)  # 50 is a multiple of no block but 2, 17 quads of no unrolling
    w = random_blocks(rng, 50, 68, block[0], 0.4, block[1])
    w[16:32] = 0  # groups without any block
    for tiles in TILES:
        check(spec, isa, w, rng.integers(0, 256, (tiles, 68, 16)).astype(np.uint8))


@pytest.mark.parametrize("isa", [EVERY_ISA[-1]])  # the shape changes loops, not instructions; AVX2 compiles fastest
@pytest.mark.parametrize(("weight", "block"), FAMILIES)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (16, 512), (131, 12)])
def test_shapes(isa, weight, block, n, k):
    rng = np.random.default_rng(n)
    w = random_blocks(rng, n, k, block[0], 0.5, block[1])
    check(DenseSpec(n, k, weight, *block), isa, w, rng.integers(0, 256, (4, k, 16)).astype(np.uint8))


@pytest.mark.parametrize("isa", [isa for isa in EVERY_ISA if isa.values[0].dot != "madd"])
def test_activations_that_are_prefetched(isa):
    rng = np.random.default_rng(8)
    spec = DenseSpec(18, 6400, "i8_sparse", 4)
    tiles = dense(spec, isa).knobs.tiles
    assert tiles * 6400 * 16 > sparse_i8.FAR_BYTES
    w = random_blocks(rng, 18, 6400, 4, 0.1)
    w[-1] = 1  # the last group reads the index to its end
    check(spec, isa, w, rng.integers(0, 256, (tiles, 6400, 16)).astype(np.uint8))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("block_rows", [1, 2])
def test_low_blocks_of_a_layer_too_wide_for_the_cache(isa, block_rows):
    rng = np.random.default_rng(9)
    n, k = 150, 4 * (2 * sparse_low_i8.K_BLOCK + 5)  # three K blocks, two chunks
    w = random_blocks(rng, n, k, block_rows, 0.1)
    w[:, :900] = 0  # a K block without any
    for tiles in (1, 2, 3, 5):
        check(DenseSpec(n, k, "i8_sparse", block_rows), isa, w, rng.integers(0, 256, (tiles, k, 16)).astype(np.uint8))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("weight", "block"), FAMILIES)
def test_extreme_values_do_not_saturate(isa, weight, block):
    spec = DenseSpec(50, 68, weight, *block)
    rows = np.full((3, 68, 16), 255, np.uint8)
    for value in (127, -127, 0):
        check(spec, isa, np.full((50, 68), value, np.int8), rows)
    check(spec, isa, np.where(np.arange(68) % 2, 127, -127).astype(np.int8) * np.ones((50, 1), np.int8), rows)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("weight", "block"), FAMILIES)
@pytest.mark.parametrize("row", [0, 3, 49])
def test_activations_that_drive_a_row_to_its_extremes_do_not_saturate(isa, weight, block, row):
    w = random_blocks(np.random.default_rng(row), 50, 68, block[0], 0.5, block[1])
    positive = np.where(w[row] > 0, 255, 0).astype(np.uint8)
    rows = np.stack([positive, 255 - positive, np.full(68, 255, np.uint8)])
    check(DenseSpec(50, 68, weight, *block), isa, w, np.repeat(rows[:, :, None], 16, 2))


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_knobs_change_the_code_but_not_the_result(isa):
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (7, 68, 16)).astype(np.uint8)
    rows_of_a_pass = 2 if isa.dot == "madd" else 3
    for knobs in (Blocking(rows_of_a_pass, tiles=1, chains=24, chunk=8), Blocking(1, tiles=2, chains=1, chunk=1000)):
        check(DenseSpec(50, 68, "i8"), isa, random_blocks(rng, 50, 68, 4, 0.5), rows, knobs)
    knobs = Blocking(rows=4, tiles=2, chains=32, chunk=16)
    check(DenseSpec(50, 68, "i8_sparse", 4, 1), isa, random_blocks(rng, 50, 68, 4, 0.5, 1), rows, knobs)
    knobs = Blocking(rows=4 if isa.dot == "madd" else 6, tiles=1, chains=16, chunk=16)
    check(DenseSpec(50, 68, "i8_sparse", 2), isa, random_blocks(rng, 50, 68, 2, 0.5), rows, knobs)
    for knobs in (
        SparseBlocking(rows=2, tiles=3, chains=32, chunk=16, ahead=0),
        SparseBlocking(rows=4, tiles=3, chains=1, chunk=16, ahead=4096, reach=3, unroll=2),
    ):
        check(DenseSpec(50, 68, "i8_sparse", 8), isa, random_blocks(rng, 50, 68, 8, 0.5), rows, knobs)


ZERO = [0] * 4


def test_packed_blocks_are_those_that_hold_a_non_zero():
    weight = np.zeros((9, 12), np.int8)
    weight[1, 3] = 7  # group 0, quad 0
    weight[8, 11] = -9  # group 2, of which only the first row exists, quad 2
    spec = DenseSpec(9, 12, "i8_sparse", 4)
    bounds, order, indptr, index, blocks = sparse_i8.pack(weight, spec, SparseBlocking(4, 1, 1, 4, reach=3))
    assert order.tolist() == [1, 0]  # fewest blocks first; the incomplete group 2 follows by itself
    assert (bounds[0], bounds[-1]) == (0, 2)
    assert indptr.tolist() == [0, 0, 2, 4]  # an even number of blocks each
    assert (index.dtype, index[:4].tolist()) == (np.uint16, [0, 0, 2, 0])
    assert len(index) == 4 + 3
    assert blocks.tolist() == [
        [ZERO, [0, 0, 0, 7], ZERO, ZERO],
        [ZERO] * 4,
        [[0, 0, 0, -9], ZERO, ZERO, ZERO],
        [ZERO] * 4,
    ]


def test_packed_lists_of_a_pass_have_one_length():
    weight = np.zeros((4, 12), np.int8)
    weight[0, :] = 1  # three blocks
    weight[2, 4] = 5  # one
    spec = DenseSpec(4, 12, "i8_sparse", 1)
    units, indptr, index, blocks = sparse_low_i8.pack(weight, spec, Blocking(2, 1, 1, 4))
    assert units.tolist() == [[1, 3], [2, 0]]  # fewest blocks first
    assert indptr.tolist() == [0, 0, 8]
    assert (index.dtype, index.tolist()) == (np.uint8, [1, 0, 0, 0, 0, 1, 2, 0])
    assert blocks.reshape(-1, 4).tolist() == [[5, 0, 0, 0], ZERO, ZERO, ZERO, [1] * 4, [1] * 4, [1] * 4, ZERO]


def test_packed_channels_are_those_that_a_group_of_rows_keeps():
    weight = np.zeros((8, 8), np.int8)
    weight[4:, 1:6] = np.arange(1, 21).reshape(4, 5)  # five channels of group 1
    bounds, order, indptr, index, blocks = sparse_channel_i8.pack(
        weight, DenseSpec(8, 8, "i8_sparse", 4, 1), Blocking(4, 1, 1, 8)
    )
    assert (bounds.tolist(), order.tolist(), indptr.tolist()) == ([0, 2], [0, 1], [0, 0, 2])
    assert (index.dtype, index.tolist()) == (np.uint16, [[1, 2, 3, 4], [5, 0, 0, 0]])
    assert blocks[0].tolist() == weight[4:, 1:5].tolist()
    assert blocks[1].tolist() == [[v, 0, 0, 0] for v in weight[4:, 5]]


def test_packed_partners_stand_together():
    weight = np.zeros((4, 12), np.int8)
    weight[0, 0:2] = 100  # above the limit, unless one is flipped
    weight[0, 8:10] = 27  # fits only if one is flipped too
    spec = DenseSpec(4, 12, "i8_sparse", 4)
    bounds, order, indptr, index, flips, masks, corrections, blocks = paired_i8.pack(weight, spec, Blocking(2, 1, 1, 4))
    assert (bounds.tolist(), order.tolist(), indptr.tolist()) == ([0, 1], [0], [0, 2, 2])
    assert (index.dtype, index.tolist(), flips.tolist()) == (np.uint16, [0, 32], [2, 2])
    assert (masks[2], corrections.tolist()) == (0xFF00, [255 * 127, 0, 0, 0])
    assert blocks.tolist() == [[[100, -100, 0, 0], ZERO], [[27, -27, 0, 0], ZERO]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 6}, "in_features is 6"),
        ({"out_features": 6, "output": "quads"}, "out_features is 6"),
        ({"out_features": 8, "output": "heads"}, "out_features is 8"),
        ({"weight": "f32", "per_token": True}, "per_token"),
        ({"weight": "i8_sparse", "block_rows": 3}, r"block is \(3, 4\)"),
        ({"weight": "i8_sparse", "block_rows": 8, "block_columns": 1}, r"block is \(8, 1\)"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"out_features": 0}, "positive"),
    ],
)
def test_impossible_layers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DenseSpec(**{"out_features": 12, "in_features": 8, "weight": "i8", **changes})


def test_pack_refuses_another_shape():
    kernel = dense(DenseSpec(8, 8, "i8"), ISAS["avx2"])
    with pytest.raises(ValueError, match=r"expected int8 \(8, 8\)"):
        kernel.pack(np.zeros((8, 4), np.int8))
