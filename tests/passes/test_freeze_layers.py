"""Requests that leave early: who, with which answer, and that the others do not notice."""

import numpy as np
import pytest
from classifiers import BATCH, CHANNELS, LABELS, LAYERS, PLACES, cache, classifier, compiled, exits, leavers
from graphs import build, ops

from whet.passes import dialect
from whet.passes.freeze_layers import freeze_layers
from whet.passes.interpret import interpret


def run(precision, *, sparsity=0.0, **thresholds):
    """Answers, and after how many layers, with these thresholds in place of ``PLACES``."""
    out = compiled(precision, freeze=True, sparsity=sparsity)(BATCH, True, exits=exits(**thresholds))
    return out[:, :LABELS], out[:, LABELS]


@pytest.mark.parametrize(("precision", "sparsity"), [("per_token", 0.0), ("static", 0.75)])
def test_those_who_leave_get_the_answer_of_the_cache_and_the_others_the_bits_they_had(precision, sparsity):
    plain = compiled(precision, sparsity=sparsity)(BATCH, True)
    # What every request would be told by each cache: a threshold of 0 lets all leave there.
    told = {
        0: run(precision, sparsity=sparsity, after0=0.0)[0],
        2: run(precision, sparsity=sparsity, after0=2.0, after2=0.0)[0],
        LAYERS: plain,
    }
    left = leavers(told, exits())
    assert set(left.tolist()) == {0, 2, 3}
    answers, layers = run(precision, sparsity=sparsity)
    np.testing.assert_array_equal(layers, left)
    for i, layer in enumerate(left):
        np.testing.assert_array_equal(answers[i], told[layer][i], str((i, layer)))
    np.testing.assert_array_equal(run(precision, sparsity=sparsity, after0=2.0, after2=2.0)[0], plain)


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
