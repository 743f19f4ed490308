import numpy as np
import pytest
from graphs import build, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.choose_kernels import NEARLY, _choose, block_density, choose_kernels
from whet.passes.graph import Graph, attributes, is_call
from whet.passes.hoist_pooling import hoist_pooling
from whet.passes.prune_blocks import prune_blocks
from whet.passes.quantise import QuantisationConfig, quantise
from whet.schedules.dense import BLOCKS
from whet.schedules.isa import ISAS, isa


def chosen(sparsity, rows):
    def write(b):
        return b.dense(b.dense(b.embed(256), 256, "first"), 8, "head")

    module = quantise(prune_blocks(build(write), sparsity, rows), QuantisationConfig(), requests(20))
    return choose_kernels(module, isa("avx512_vnni"))


def test_a_dense_weight_stays_dense():
    module, choices = chosen(0.0, 4)
    assert [c.block_rows for c in choices] == [0]
    assert all(
        "block_rows" not in attributes(b.value) for b in Graph(module).bindings if is_call(b.value, dialect.DENSE)
    )


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_blocks_are_found_in_the_zeros(rows):
    module, (choice,) = chosen(0.9, rows)
    assert choice.layer == "first"
    # Tall blocks are made of lower ones, which may be the faster kernel.
    assert 4 <= choice.block_rows <= rows
    assert choice.block_columns == 4
    assert choice.zeros == pytest.approx(0.9, abs=0.01)
    assert choice.density == pytest.approx(0.1, abs=0.01)
    assert choice.kernel == f"{choice.block_rows}x4 sparse"
    assert choice.cycles[choice.kernel] <= NEARLY * min(choice.cycles.values())
    first = next(b.value for b in Graph(module).bindings if b.var.name == "first")
    assert attributes(first)["block_rows"] == choice.block_rows


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("block", BLOCKS["i8_sparse"])
def test_the_shape_of_the_zeros_is_recognised(name, block):
    choice = _choose("layer", random_blocks(*block, 0.1), isa(name), 4)
    assert choice.density == pytest.approx(0.1, abs=0.01)
    rows, columns = block
    # A taller block is taken for several lower ones; 16 × 4 gains nothing over 8 × 4.
    assert (choice.block_rows, choice.block_columns) == (min(rows, 8), columns) or rows > 4


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("kept", [0.05, 0.1, 0.2, 0.5, 1.0])
def test_unstructured_zeros_never_cost_more_than_dense(name, kept):
    choice = _choose("layer", random_blocks(1, 1, kept), isa(name), 4)
    assert choice.cycles[choice.kernel] <= choice.cycles["dense"]
    if kept == 0.05:
        assert choice.block_rows
    if kept > 0.2:
        assert choice.density < 0.9 or not choice.block_rows


def test_on_amx_zeros_without_structure_are_left_out_of_memory():
    choice = _choose("layer", random_blocks(1, 1, 0.2), isa("amx_int8"), 4)
    assert choice.kernel == "1x1 expanded"
    assert choice.density == pytest.approx(0.2, abs=0.01)


def test_many_tokens_favour_dense_products_on_amx():
    kernels = [_choose("layer", random_blocks(4, 4, 0.2), isa("amx_int8"), tiles).kernel for tiles in (1, 64)]
    assert kernels[0].endswith("4x4 sparse")
    assert kernels[1] in ("4x4 expanded", "8x4 expanded", "dense")


def test_layers_of_first_tokens_are_chosen_for_one_tile():
    def write(b):
        whole = b.const
        kept = random_blocks(4, 4, 0.2).astype(np.float32)
        b.const = lambda *shape: relax.const(b.array(*shape) * kept) if shape == (768, 768) else whole(*shape)
        every = b.dense(b.embed(768), 768, "every")
        first, mean = (
            b.emit(dialect.pool(x, b.segments, mode=mode), mode)
            for x, mode in ((b.dense(every, 768, "first"), "cls"), (every, "mean"))
        )
        return b.emit(dialect.add(first, mean), "sum")

    module = hoist_pooling(quantise(build(write), QuantisationConfig(), requests(20)))
    _, (every, first) = choose_kernels(module, isa("amx_int8"), tokens=64 * 16)
    assert (every.layer, first.layer) == ("every", "first")
    assert every.kernel.split()[-1] in ("dense", "expanded")
    assert first.kernel.split()[-1] == "sparse"


def random_blocks(rows, columns, kept):
    """An int8 weight of 768 × 768 of which a share of the blocks is kept."""
    rng = np.random.default_rng(0)
    keep = rng.random((768 // rows, 768 // columns)) < kept
    return np.repeat(np.repeat(keep, rows, 0), columns, 1).astype(np.int8)


def test_block_density_pads_rows():
    values = np.zeros((6, 8), np.int8)
    values[5, 0] = 1
    assert block_density(values, 4, 4) == 0.25
    assert block_density(values, 1, 4) == pytest.approx(1 / 12)
    assert block_density(values, 4, 1) == pytest.approx(1 / 16)
