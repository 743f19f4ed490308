"""Requests that leave early: who, with which answer, and that the others do not notice."""

import numpy as np
import pytest
from classifiers import BATCH, CHANNELS, LABELS, LAYERS, PLACES, cache, classifier, compiled, exits, halving, leavers
from graphs import build, ops

from whet.passes import dialect
from whet.passes.freeze_layers import freeze_layers
from whet.passes.interpret import interpret


@pytest.mark.parametrize(("precision", "sparsity"), [("per_token", 0.0), ("static", 0.75)])
def test_those_who_leave_get_the_answer_of_the_cache_and_the_others_the_bits_they_had(precision, sparsity):
    frozen = compiled(precision, sparsity=sparsity, freeze=True)
    nobody = exits(after0=2.0, after2=2.0)
    # What every request would be told by each cache: a threshold of 0 lets all leave there.
    told = {
        0: frozen(BATCH, True, exits=exits(after0=0.0))[:, :LABELS],
        2: frozen(BATCH, True, exits=exits(after0=2.0, after2=0.0))[:, :LABELS],
        LAYERS: compiled(precision, sparsity=sparsity)(BATCH, True),
    }
    some = halving(told)
    left = leavers(told, some)
    assert set(left.tolist()) == {0, 2, 3}
    got = frozen(BATCH, True, exits=some)
    np.testing.assert_array_equal(got[:, LABELS], left)
    np.testing.assert_array_equal(got[:, :LABELS], [told[layer][i] for i, layer in enumerate(left)])
    np.testing.assert_array_equal(frozen(BATCH, True, exits=nobody)[:, :LABELS], told[LAYERS])


def test_compiled_and_interpreted_agree():
    frozen = freeze_layers(build(classifier), [cache(*place) for place in PLACES])
    np.testing.assert_allclose(compiled("fp32", freeze=True)(BATCH, True), interpret(frozen, BATCH), atol=2e-4)
    assert ops(frozen).count("stay") == 2


def test_the_same_module_serves_batches_of_all_sizes():
    call = compiled("static", freeze=True, sparsity=0.75)
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
