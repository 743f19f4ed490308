import numpy as np
import pytest
import tvm
from graphs import build, encoder_layer, requests

from whet.passes import dialect
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.graph import Graph, is_call
from whet.passes.interpret import interpret
from whet.passes.pad_heads import pad_heads


def test_padded_heads_give_the_same_answer():
    module = fuse_qkv(build(lambda b: encoder_layer(b, 12, 2, 16)))  # heads of 6
    padded = pad_heads(module)
    attention = next(b.var for b in Graph(padded).bindings if is_call(b.value, dialect.SELF_ATTENTION))
    assert dialect.shape_of(attention)[1] == 16
    np.testing.assert_allclose(interpret(padded, requests(7, 3)), interpret(module, requests(7, 3)), atol=1e-5)


def test_heads_of_a_multiple_of_4_stay():
    module = fuse_qkv(build(lambda b: encoder_layer(b, 16, 2, 16)))
    tvm.ir.assert_structural_equal(pad_heads(module), module)


def test_a_result_that_cannot_be_padded_is_an_error():
    def bare(b):
        h = b.embed(12)
        q, k, v = (b.dense(h, 12, name) for name in "qkv")
        context = b.emit(dialect.attention(q, k, v, b.segments, heads=2, scale=1.0), "context")
        return b.emit(dialect.add(context, h), "sum")

    with pytest.raises(ValueError, match="no multiple of 4"):
        pad_heads(fuse_qkv(build(bare)))
