import numpy as np
from graphs import build, encoder_layer, requests

from whet.passes import dialect
from whet.passes.correct_biases import correct_biases
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.graph import Graph, is_call
from whet.passes.interpret import interpret
from whet.passes.quantise import QuantisationConfig, quantise

TEXTS = requests(20, 31, 5, 9)


def means(module):
    """Of every dense layer's output, by name."""
    found = {}
    names = {b.var.name for b in Graph(module).bindings if is_call(b.value, dialect.DENSE)}
    interpret(module, TEXTS, None, lambda name, rows: found.update({name: rows.mean(0)} if name in names else {}))
    return found


def quantised():
    module = fuse_residuals(fuse_activations(fuse_qkv(build(lambda b: encoder_layer(b, 64, 2, 128)))))
    config = QuantisationConfig("static", "percentile", 90.0)  # clips so much that means move
    return module, quantise(module, config, TEXTS)


def test_means_of_linear_layers_become_those_of_the_float_graph():
    module, rounded = quantised()
    wanted, before, after = means(module), means(rounded), means(correct_biases(rounded, module, TEXTS))
    for name in ("context_qkv", "sum1", "sum2"):
        np.testing.assert_allclose(after[name], wanted[name], atol=1e-4)
        assert np.abs(before[name] - wanted[name]).max() > 0.01


def test_int8_comes_closer():
    module, rounded = quantised()
    reference = interpret(module, TEXTS)
    errors = [
        np.square(interpret(m, TEXTS) - reference).mean() for m in (rounded, correct_biases(rounded, module, TEXTS))
    ]
    assert errors[1] < 0.9 * errors[0]


def test_float_layers_are_left_alone():
    def write(b):
        pooled = b.emit(dialect.pool(b.dense(b.embed(64), 64, "wide"), b.segments, mode="cls"), "pooled")
        return b.dense(pooled, 64, "classifier")

    module = build(write)
    corrected = Graph(correct_biases(quantise(module, QuantisationConfig("static"), TEXTS), module, TEXTS))
    before, after = (
        next(g.constant(b.value.args[2]) for b in g.bindings if b.var.name == "classifier")
        for g in (Graph(module), corrected)
    )
    np.testing.assert_array_equal(before, after)
