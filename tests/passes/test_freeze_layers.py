"""Requests that leave early: who, with which answer, and that the others do not notice."""

import functools

import numpy as np
import pytest
from execute import program
from graphs import build, ops, requests
from tvm import relax

from whet.caching.cache import Cache
from whet.caching.learn import linear
from whet.passes import dialect
from whet.passes.freeze_layers import freeze_layers
from whet.passes.interpret import interpret
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.progress import Silent
from whet.schedules.isa import isa

CHANNELS, LABELS, LAYERS = 32, 5, 3
ISA = isa("avx2")
BATCH = requests(20, 3, 16, 1, 33, 5, 16, 16, 7, 50, 2, 12, 40, 9, 4, 18, 6, 31, 8)
PLACES = ((0, 0.52), (2, 0.8))
"""Layers and thresholds where some leave and some do not."""


def classifier(b):
    h = b.embed(CHANNELS)
    norm = [relax.const(np.ones(CHANNELS, np.float32)), relax.const(np.zeros(CHANNELS, np.float32))]
    for i in range(LAYERS):
        qkv = b.dense(h, 3 * CHANNELS, f"qkv{i}")
        context = b.emit(dialect.self_attention(qkv, b.segments, heads=2, scale=0.2), f"context{i}")
        out = b.emit(dialect.dense(context, b.const(CHANNELS, CHANNELS), b.const(CHANNELS), h), f"out{i}")
        h = b.emit(dialect.layer_norm(out, *norm, eps=1e-5), f"norm1.{i}")
        up = b.dense(h, 2 * CHANNELS, f"up{i}", activation="gelu")
        down = b.emit(dialect.dense(up, b.const(CHANNELS, 2 * CHANNELS), b.const(CHANNELS), h), f"down{i}")
        h = b.emit(dialect.layer_norm(down, *norm, eps=1e-5), f"norm2.{i}")
    pooled = b.emit(dialect.pool(h, b.segments, mode="cls"), "pooled")
    return b.dense(b.dense(pooled, CHANNELS, "pooler", activation="tanh"), LABELS, "logits")


def cache(layer, threshold, channels=CHANNELS):
    rng = np.random.default_rng(layer)
    numbers = ((0.3, (LABELS, channels)), (1, LABELS), (1, channels), (0.1, channels))
    arrays = linear(*(rng.normal(0, spread, shape).astype("float32") for spread, shape in numbers))
    return Cache(layer, "classifier", arrays, threshold)


def lowered(caches, precision, probe=False):
    config = QuantisationConfig(precision) if precision != "fp32" else None
    batch = requests(20, 30)
    options = Options((ISA,), max_length=64, quantisation=config, freeze=tuple(caches), probe=probe)
    return run_pipeline(build(classifier), options, batch, [b * 0 for b in batch], Silent())[0].lowered


@functools.cache
def compiled(precision, freeze=True):
    """A module with caches, or the plain one: compiled once for all tests."""
    return program(lowered([cache(*place) for place in PLACES] if freeze else [], precision), ISA)


def run(precision, **thresholds):
    """Answers, and after how many layers, with these thresholds in place of ``PLACES``."""
    exits = np.array(
        [[layer for layer, _ in PLACES], [thresholds.get(f"after{at[0]}", at[1]) for at in PLACES]], "float32"
    )
    out = compiled(precision)(BATCH, True, exits=exits)
    return out[:, :LABELS], out[:, LABELS]


@pytest.mark.parametrize("precision", ["per_token", "static"])
def test_those_who_leave_get_the_answer_of_the_cache_and_the_others_the_bits_they_had(precision):
    plain = compiled(precision, freeze=False)(BATCH, True)
    # What every request would be told by each cache: a threshold of 0 lets all leave there.
    told = {0: run(precision, after0=0.0)[0], 2: run(precision, after0=2.0, after2=0.0)[0], LAYERS: plain}
    left = np.full(len(BATCH), LAYERS)
    for layer, threshold in PLACES[::-1]:
        probability = 1 / np.exp(told[layer] - told[layer].max(1, keepdims=True)).sum(1)
        left[probability >= threshold] = layer
    assert set(left.tolist()) == {0, 2, 3}
    answers, layers = run(precision)
    np.testing.assert_array_equal(layers, left)
    for i, layer in enumerate(left):
        np.testing.assert_array_equal(answers[i], told[layer][i], str((i, layer)))
    np.testing.assert_array_equal(run(precision, after0=2.0, after2=2.0)[0], plain)


def test_compiled_and_interpreted_agree():
    frozen = freeze_layers(build(classifier), [cache(*place) for place in PLACES])
    np.testing.assert_allclose(compiled("fp32")(BATCH, True), interpret(frozen, BATCH), atol=2e-4)
    assert ops(frozen).count("stay") == 2


def test_the_same_module_serves_batches_of_all_sizes():
    call = compiled("static")
    together = call(BATCH, True)
    for i, request in enumerate(BATCH):
        np.testing.assert_array_equal(call([request], True)[0], together[i])
    np.testing.assert_array_equal(call(BATCH, True), together)


def test_a_cache_of_another_model_is_refused():
    module = build(classifier)
    with pytest.raises(ValueError, match="after layer 3; expected 0 to 2"):
        freeze_layers(module, [cache(3, 0.5)])
    with pytest.raises(ValueError, match="is for 8 channels and 5 outputs; the model has 32 and 5"):
        freeze_layers(module, [cache(1, 0.5, channels=8)])


def test_a_layer_that_later_ones_look_past_is_no_place_to_leave():
    def skipping(b):
        h = first = b.embed(CHANNELS)
        for i in range(2):
            qkv = b.dense(h, 3 * CHANNELS, f"qkv{i}")
            h = b.emit(dialect.self_attention(qkv, b.segments, heads=2, scale=0.2), f"context{i}")
        h = b.emit(dialect.add(h, first), "sum")
        return b.dense(b.emit(dialect.pool(h, b.segments, mode="cls"), "pooled"), LABELS, "logits")

    with pytest.raises(ValueError, match="after layer 1 the model still reads embeddings"):
        freeze_layers(build(skipping), [cache(1, 0.5)])
