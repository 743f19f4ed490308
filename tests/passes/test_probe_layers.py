"""The probe shows the hidden states that the caches will see."""

import numpy as np
from classifiers import BATCH, CHANNELS, ISA, LABELS, LAYERS, cache, classifier, lowered
from execute import program
from graphs import build, requests

from whet.caching.cache import look_up
from whet.passes.freeze_layers import freeze_layers
from whet.passes.interpret import interpret
from whet.passes.probe_layers import probe_layers


def test_hidden_states_and_logits():
    module = build(classifier)
    shown = interpret(probe_layers(module), BATCH)
    assert shown.shape == (len(BATCH), LAYERS * CHANNELS + LABELS)
    np.testing.assert_array_equal(shown[:, -LABELS:], interpret(module, BATCH))
    for layer in range(LAYERS):
        everyone = cache(layer, 0.0)
        states = shown[:, layer * CHANNELS : (layer + 1) * CHANNELS]
        answers, trust = look_up(states, *everyone.arrays, kind=everyone.kind)
        left = interpret(freeze_layers(module, [everyone]), BATCH)
        np.testing.assert_allclose(left, np.column_stack([answers, np.full(len(BATCH), layer), trust]), atol=1e-5)


def test_it_compiles():
    batch = requests(20, 3, 40)
    shown = program(lowered("fp32", probe=True), ISA)(batch, True)
    np.testing.assert_allclose(shown, interpret(probe_layers(build(classifier)), batch), atol=2e-4)
