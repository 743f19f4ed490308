"""Lowered modules against the interpreter: the same graph in fp32, and the same integers where it is quantised."""

import numpy as np
import pytest
from execute import program, run
from graphs import build, encoder_layer, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.interpret import interpret
from whet.passes.lower import lower
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.prune_blocks import prune_blocks
from whet.passes.quantise import QuantisationConfig
from whet.progress import Silent
from whet.schedules.isa import isa

ISA = isa("avx2")  # what every x86-64 machine that runs these tests has


def compiled(write, quantisation, **options):
    chosen = Options((ISA,), max_length=64, quantisation=quantisation, **options)
    calibration = requests(20, 31, 64)
    return run_pipeline(build(write), chosen, calibration, [np.zeros_like(r) for r in calibration], Silent())[0]


def layer(b):
    return encoder_layer(b, 64, 2, 128)


def odd_heads(b):
    return encoder_layer(b, 36, 2, 64)  # heads of 18


def pooled(b):
    norm = [relax.const(np.ones(64, np.float32)), relax.const(np.zeros(64, np.float32))]
    h = b.embed(64)
    up = b.emit(dialect.activate(b.dense(h, 128, "up"), kind="gelu_tanh"), "gelu")
    total = b.emit(dialect.add(b.dense(up, 64, "down"), h), "sum")
    normal = b.emit(dialect.layer_norm(total, *norm, eps=1e-5), "norm")
    pooled = b.emit(dialect.pool(normal, b.segments, mode="mean"), "pool")
    return b.emit(dialect.normalize(b.dense(pooled, 5, "head", activation="tanh")), "unit")


@pytest.mark.parametrize("write", [layer, odd_heads, pooled])
def test_fp32_equals_the_interpreter(write):
    batch = requests(7, 1, 33, 16)
    got = run(compiled(write, None).lowered, ISA, batch, write is pooled)
    np.testing.assert_allclose(got, interpret(build(write), batch), atol=2e-5)


@pytest.mark.parametrize("activations", ["static", "per_token"])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@pytest.mark.parametrize("write", [layer, pooled])
def test_int8_is_close_to_fp32_of_the_same_weights(write, sparsity, activations):
    batch = requests(7, 1, 33, 16)
    result = compiled(write, QuantisationConfig(activations=activations), sparsity=sparsity)
    got = run(result.lowered, ISA, batch, write is pooled)
    want = interpret(pruned(write, sparsity), batch)
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.98


@pytest.mark.parametrize("block", [(4, 1), (1, 4)])
def test_other_blocks_of_zeros_run_as_what_they_are(block):
    def masked(b):
        whole, random = b.const, np.random.default_rng(2)

        def const(*shape):
            if len(shape) < 2 or shape[0] % 4:
                return whole(*shape)
            keep = random.random((shape[0] // block[0], shape[1] // block[1])) < 0.1
            return relax.const(b.array(*shape) * np.kron(keep, np.ones(block, np.float32)))

        b.const = const
        return encoder_layer(b, 64, 2, 256)

    batch = requests(7, 1, 33, 16)
    result = compiled(masked, QuantisationConfig())
    assert {(c.block_rows, c.block_columns) for c in result.choices} == {block}
    got, want = run(result.lowered, ISA, batch, per_request=False), interpret(build(masked), batch)
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.98


def pruned(write, sparsity):
    return prune_blocks(fuse_qkv(build(write)), sparsity, 4)


def test_an_answer_does_not_depend_on_its_neighbours():
    answer = program(compiled(layer, QuantisationConfig()).lowered, ISA)
    batch = requests(7, 1, 33, 16)
    together = answer(batch, False)
    alone = np.concatenate([answer([r], False) for r in batch])
    np.testing.assert_array_equal(together, alone)


def test_a_value_read_as_integers_and_floats_is_made_once_in_each_form():
    def write(b):
        h = b.dense(b.embed(64), 64, "shared")
        return b.emit(dialect.add(b.dense(h, 64, "reader"), h), "sum")

    result = compiled(write, QuantisationConfig())
    batch = requests(5, 12)
    got = run(result.lowered, ISA, batch, per_request=False)
    want = interpret(build(write), batch)
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    assert str(result.lowered.module.script(show_meta=False)).count("cls.quantize") == 1


def test_an_op_without_a_kernel_is_named():
    def write(b):
        h = b.embed(8)
        return b.emit(dialect.attention(h, h, h, b.segments, heads=2, scale=1.0), "context")

    with pytest.raises(ValueError, match=r"context: op relax\.whet\.attention has no kernel"):
        lower(build(write), ISA, 64)
