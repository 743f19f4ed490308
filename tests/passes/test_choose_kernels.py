import numpy as np
import pytest
from graphs import build, requests

from whet.passes import dialect
from whet.passes.choose_kernels import block_density, choose_kernels
from whet.passes.graph import Graph, attributes, is_call
from whet.passes.prune_blocks import prune_blocks
from whet.passes.quantise import QuantisationConfig, quantise
from whet.schedules.isa import isa


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
    assert 0 < choice.block_rows <= rows
    assert choice.zeros == pytest.approx(0.9, abs=0.01)
    assert choice.density == pytest.approx(0.1, abs=0.01)
    assert choice.cycles[f"{choice.block_rows}x4"] == min(choice.cycles.values())
    first = next(b.value for b in Graph(module).bindings if b.var.name == "first")
    assert attributes(first)["block_rows"] == choice.block_rows


def test_block_density_pads_rows():
    values = np.zeros((6, 8), np.int8)
    values[5, 0] = 1
    assert block_density(values, 4) == 0.25
    assert block_density(values, 1) == pytest.approx(1 / 12)
