import numpy as np
import pytest
from graphs import build

from whet.passes import dialect
from whet.passes.choose_kernels import block_density
from whet.passes.graph import Graph, is_call
from whet.passes.prune_blocks import prune, prune_blocks


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_the_weakest_blocks_go(rows):
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    pruned = prune(weight, 0.75, rows)
    assert block_density((pruned != 0).astype(np.int8), rows, 4) == pytest.approx(0.25, abs=0.01)
    blocks = np.abs(weight.reshape(32 // rows, rows, 16, 4)).mean(axis=(1, 3))
    kept = np.abs(pruned.reshape(32 // rows, rows, 16, 4)).max(axis=(1, 3)) > 0
    assert blocks[kept].min() > blocks[~kept].max()
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])


def test_heads_and_odd_sizes_stay():
    def write(b):
        h = b.dense(b.embed(16), 32, "wide")
        odd = b.dense(h, 30, "odd")  # 4 does not divide 30
        return b.dense(odd, 3, "head")

    graph = Graph(prune_blocks(build(write), 0.5))
    zeros = {
        b.var.name: float((graph.constant(b.value.args[1]) == 0).mean())
        for b in graph.bindings
        if is_call(b.value, dialect.DENSE)
    }
    assert zeros == {"wide": 0.5, "odd": 0.0, "head": 0.0}


@pytest.mark.parametrize(("sparsity", "rows", "message"), [(1.0, 4, "sparsity is 1.0"), (0.5, 3, "block_rows is 3")])
def test_bad_arguments(sparsity, rows, message):
    with pytest.raises(ValueError, match=message):
        prune_blocks(build(lambda b: b.embed(8)), sparsity, rows)
