import numpy as np
import pytest
from execute import program
from graphs import build, encoder_layer, ops, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.error_budget import noise
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.graph import Graph, attributes, is_call
from whet.passes.interpret import interpret
from whet.passes.lower import lower
from whet.passes.quantise import QuantisationConfig, quantise, quantise_weight, raised_layers
from whet.passes.smooth_outliers import smooth_outliers
from whet.schedules.isa import ISAS


def fused(write):
    return fuse_residuals(fuse_activations(fuse_qkv(build(write))))


def layer(b):
    return encoder_layer(b, 64, 2, 128)


def dense_attributes(module):
    return {b.var.name: attributes(b.value) for b in Graph(module).bindings if is_call(b.value, dialect.DENSE)}


def test_every_layer_of_an_encoder_becomes_integer():
    module = fused(layer)
    quantised = quantise(module, QuantisationConfig(activations="static"), requests(20, 31, 5))
    assert all("x_scale" in a for a in dense_attributes(quantised).values())
    attention = next(b.value for b in Graph(quantised).bindings if is_call(b.value, dialect.SELF_ATTENTION))
    assert set(attributes(attention)) == {"heads", "scale", "q_scale", "k_scale", "v_scale"}
    assert ops(quantised).count("quantized_weight") == 5  # four layers and the word embeddings
    before, after = interpret(module, requests(9, 17)), interpret(quantised, requests(9, 17))
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosine.min() > 0.99


def test_per_token_scales_are_for_normalised_inputs():
    found = dense_attributes(quantise(fused(layer), QuantisationConfig(activations="per_token"), requests(20)))
    assert {name for name, a in found.items() if a.get("per_token")} == {"context_qkv", "gelu"}
    assert {name for name, a in found.items() if "x_scale" in a} == {"sum1", "sum2"}


def test_small_heads_and_layers_per_request_stay_float():
    def write(b):
        h = b.dense(b.embed(64), 64, "wide")
        b.dense(h, 3, "tags")
        pooled = b.emit(dialect.pool(h, b.segments, mode="cls"), "pooled")
        return b.dense(pooled, 64, "classifier")

    found = dense_attributes(quantise(build(write), QuantisationConfig(activations="static"), requests(20)))
    assert ["x_scale" in found[n] for n in ("wide", "classifier")] == [True, False]


def test_integer_weights_of_the_source_are_kept():
    values = np.random.default_rng(0).integers(-128, 128, (64, 64)).astype(np.int8)

    def write(b):
        scale = np.full(64, 0.01, np.float32)
        weight = b.emit(dialect.quantized_weight(relax.const(values), relax.const(scale)), "w")
        return b.emit(dialect.dense(b.embed(64), weight, b.const(64)), "wide")

    graph = Graph(quantise(build(write), QuantisationConfig(), requests(20)))
    wide = next(b.value for b in graph.bindings if b.var.name == "wide")
    np.testing.assert_array_equal(graph.constant(graph.producer(wide.args[1]).args[0]), values)


@pytest.mark.parametrize("activations", ["static", "per_token"])
def test_a_budget_of_error_is_kept_by_raising_layers(activations):
    module, texts = fused(layer), requests(20, 31, 5, 9)
    free = QuantisationConfig(activations=activations)
    tight = QuantisationConfig(activations=activations, max_error=0.003)
    reference = interpret(module, texts)
    errors = {}
    for config in (free, tight):
        quantised = quantise(smooth_outliers(module, config, texts), config, texts)
        errors[config] = noise(interpret(quantised, texts), reference)
    assert errors[tight] <= 0.003 < errors[free]
    raised = raised_layers(quantised)
    assert 0 < len(raised) < 4
    assert all("stays float32" in line or "scale per token" in line for line in raised)
    floats = {name for name, a in dense_attributes(quantised).items() if not {"x_scale", "per_token"} & set(a)}
    assert floats == {line.partition(":")[0] for line in raised if "float32" in line}


@pytest.mark.parametrize("activations", ["static", "per_token"])
@pytest.mark.parametrize(
    ("raised", "level"),
    [("context_qkv", "float32"), ("sum1", "float32"), ("gelu", "float32"), ("sum2", "per_token"), ("sum2", "float32")],
)
def test_compiled_with_a_raised_layer_it_computes_what_the_interpreter_does(monkeypatch, activations, raised, level):
    def choose(ladders, *_):
        levels = {var: level if var.name == raised else ladder[0] for var, ladder in ladders.items()}
        return levels, {}

    monkeypatch.setattr("whet.passes.quantise.choose_levels", choose)
    config, texts = QuantisationConfig(activations=activations, max_error=1.0), requests(20, 31, 5, 9)
    quantised = quantise(smooth_outliers(fused(layer), config, texts), config, texts)
    lowered = lower(quantised, ISAS["avx2"], max_length=64)
    got, want = program(lowered, ISAS["avx2"])(texts, False), interpret(quantised, texts)
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_a_budget_that_float_layers_cannot_meet_is_an_error():
    with pytest.raises(ValueError, match=r"max_error is 1e-09.*embeddings"):
        quantise(fused(layer), QuantisationConfig(max_error=1e-9), requests(20, 31))


def test_a_raised_layer_reads_its_input_as_it_was():
    """Without the scales of smoothing, which only static integers can take in."""
    module, config = fused(layer), QuantisationConfig(activations="static", max_error=0.001)
    texts = requests(20, 31, 5, 9)
    graph = Graph(quantise(smooth_outliers(module, config, texts), config, texts))
    dense = [b.value for b in graph.bindings if is_call(b.value, dialect.DENSE)]
    scaled = [call for call in dense if is_call(graph.producer(call.args[0]), dialect.SCALE_CHANNELS)]
    assert all("x_scale" in attributes(call) for call in scaled)


def test_weights_round_symmetrically_and_keep_zeros():
    weight = np.float32([[1.27, -0.01, 0, 0.635], [0, 0, 0, 0]])
    values, scale = quantise_weight(weight)
    np.testing.assert_array_equal(values, [[127, -1, 0, 64], [0, 0, 0, 0]])
    np.testing.assert_allclose(scale, [0.01, 1.0])


def test_configuration_round_trips_and_refuses_nonsense():
    config = QuantisationConfig(activations="static", method="percentile", percentile=99.9)
    assert QuantisationConfig.from_json(config.to_json()) == config
    for bad in ({"activations": "dynamic"}, {"method": "kl"}, {"percentile": 20.0}, {"max_error": 0.0}, {"version": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            QuantisationConfig(**bad)
