import numpy as np
import pytest
from execute import program
from graphs import build, encoder_layer, ops, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.graph import Graph, is_call
from whet.passes.interpret import interpret
from whet.passes.lower import lower
from whet.passes.quantise import QuantisationConfig, quantise
from whet.passes.smooth_outliers import smooth_outliers
from whet.schedules.isa import ISAS

STATIC, PER_TOKEN = QuantisationConfig("static"), QuantisationConfig("per_token")
TEXTS = requests(20, 31, 5, 9)


def with_outliers(b):
    """A transformer layer in which one channel of what the GELU and the embeddings make reaches 40 times as far."""
    plain = b.array

    def array(*shape):
        values = plain(*shape)
        if len(shape) == 2 and shape in ((128, 64), (50, 64)):
            values[3 if shape[0] == 128 else slice(None), 5] *= 40
        return values

    b.array = array
    return encoder_layer(b, 64, 2, 128)


@pytest.fixture(scope="module")
def module():
    return fuse_residuals(fuse_activations(fuse_qkv(build(with_outliers))))


def smoothed(module):
    """Names of the values that were scaled, and the factors."""
    graph = Graph(module)
    calls = [b.value for b in graph.bindings if is_call(b.value, dialect.SCALE_CHANNELS)]
    return {call.args[0].name: graph.constant(call.args[1]) for call in calls}


def test_outlier_channels_are_scaled_and_the_answer_stays(module):
    after = smooth_outliers(module, STATIC, TEXTS)
    factors = smoothed(after)["embeddings"]
    assert factors.argmin() == 5 and factors[5] < 0.5
    assert (factors <= 1).all() and (factors == 1).mean() > 0.8
    np.testing.assert_allclose(interpret(after, TEXTS), interpret(module, TEXTS), atol=1e-4)


def test_only_what_gets_one_scale_for_all_tokens_is_scaled(module):
    assert set(smoothed(smooth_outliers(module, STATIC, TEXTS))) <= {"embeddings", "norm1", "gelu"}
    assert set(smoothed(smooth_outliers(module, PER_TOKEN, TEXTS))) == {"gelu"}


def test_int8_comes_closer(module):
    reference = interpret(module, TEXTS)
    before, after = (
        np.square(interpret(quantise(m, STATIC, TEXTS), TEXTS) - reference).mean()
        for m in (module, smooth_outliers(module, STATIC, TEXTS))
    )
    assert after < 0.9 * before


def test_integer_weights_of_the_source_are_left_alone():
    def write(b):
        values = b.random.integers(-127, 128, (64, 64)).astype(np.int8)
        weight = b.emit(dialect.quantized_weight(relax.const(values), relax.const(np.full(64, 0.01, "f4"))), "w")
        return b.emit(dialect.dense(b.embed(64), weight, b.const(64)), "wide")

    module = build(write)
    assert "scale_channels" not in ops(smooth_outliers(module, STATIC, TEXTS))


def test_compiled_it_computes_what_the_interpreter_does(module):
    """What makes the values scales them: no kernel is left for it."""
    quantised = quantise(smooth_outliers(module, STATIC, TEXTS), STATIC, TEXTS)
    lowered = lower(quantised, ISAS["avx2"], max_length=64)
    assert "scale_channels" not in str(lowered.module.script(show_meta=False))
    got, want = program(lowered, ISAS["avx2"])(TEXTS, False), interpret(quantised, TEXTS)
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
