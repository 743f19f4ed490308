"""The fusing passes: fuse_activations, fuse_residuals, fuse_qkv."""

import numpy as np
import pytest
import tvm
from graphs import Builder, build, encoder_layer, ops, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.interpret import interpret


def test_activation_moves_into_dense():
    def before(b: Builder) -> relax.Var:
        return b.emit(dialect.activate(b.dense(b.embed(8), 16, "up"), kind="gelu"), "gelu")

    def expected(b: Builder) -> relax.Var:
        return b.dense(b.embed(8), 16, "gelu", activation="gelu")

    tvm.ir.assert_structural_equal(fuse_activations(build(before)), build(expected))


def test_activation_stays_where_the_dense_result_is_used_twice():
    def twice(b: Builder) -> relax.Var:
        up = b.dense(b.embed(8), 16, "up")
        return b.emit(dialect.add(b.emit(dialect.activate(up, kind="relu"), "relu"), up), "sum")

    tvm.ir.assert_structural_equal(fuse_activations(build(twice)), build(twice))


@pytest.mark.parametrize("swapped", [False, True])
def test_residual_moves_into_dense(swapped: bool):
    def before(b: Builder) -> relax.Var:
        h = b.embed(8)
        out = b.dense(h, 8, "out")
        return b.emit(dialect.add(h, out) if swapped else dialect.add(out, h), "sum")

    def expected(b: Builder) -> relax.Var:
        h = b.embed(8)
        return b.emit(dialect.dense(h, b.const(8, 8), b.const(8), h), "sum")

    tvm.ir.assert_structural_equal(fuse_residuals(build(before)), build(expected))


def test_a_dense_layer_takes_one_residual():
    def before(b: Builder) -> relax.Var:
        h = b.embed(8)
        once = b.emit(dialect.add(b.dense(h, 8, "out"), h), "once")
        return b.emit(dialect.add(once, h), "twice")

    assert ops(fuse_residuals(build(before))) == ["embed", "dense", "add"]


def test_qkv_becomes_one_dense():
    module = fuse_qkv(build(lambda b: encoder_layer(b, 16, 2, 32)))
    assert ops(module)[:3] == ["embed", "dense", "self_attention"]


def test_q_k_v_of_different_values_are_stacked():
    def mixed(b: Builder) -> relax.Var:
        h = b.embed(8)
        q, k = b.dense(h, 8, "q"), b.dense(h, 8, "k")
        v = b.dense(b.dense(h, 8, "other"), 8, "v")
        return b.emit(dialect.attention(q, k, v, b.segments, heads=2, scale=0.5), "context")

    module = build(mixed)
    fused = fuse_qkv(module)
    assert ops(fused)[-2:] == ["stack", "self_attention"]
    np.testing.assert_allclose(interpret(fused, requests(5, 3)), interpret(module, requests(5, 3)), atol=1e-6)


def test_integer_weights_stay_integers_when_fused():
    def quantised(b: Builder) -> relax.Var:
        h = b.embed(8)
        parts = []
        for name in ("q", "k", "v"):
            values = relax.const(b.random.integers(-128, 128, (8, 8)).astype(np.int8))
            scale = relax.const(np.abs(b.array(8)))
            weight = b.emit(dialect.quantized_weight(values, scale), name + "_weight")
            parts.append(b.emit(dialect.dense(h, weight, b.const(8)), name))
        return b.emit(dialect.attention(*parts, b.segments, heads=2, scale=0.5), "context")

    module = build(quantised)
    fused = fuse_qkv(module)
    assert ops(fused) == ["embed", "quantized_weight", "dense", "self_attention"]
    np.testing.assert_allclose(interpret(fused, requests(5, 3)), interpret(module, requests(5, 3)), atol=1e-5)


def test_fusing_a_whole_layer_keeps_the_answer():
    module = build(lambda b: encoder_layer(b, 16, 2, 32))
    fused = fuse_residuals(fuse_activations(fuse_qkv(module)))
    assert ops(fused) == ["embed", "dense", "self_attention", "dense", "layer_norm", "dense", "dense", "layer_norm"]
    np.testing.assert_allclose(interpret(fused, requests(7, 1, 20)), interpret(module, requests(7, 1, 20)), atol=1e-5)
