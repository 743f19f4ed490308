"""Attention that uses records of earlier requests: the bits of all answers, in batches of hits and misses."""

import numpy as np
import pytest
from classifiers import BATCH, CHANNELS, HEADS, LABELS, LAYERS, classifier, compiled, exits, halving, leavers
from execute import aligned
from graphs import build, ops, requests

from whet.passes.interpret import interpret
from whet.passes.memoize_attention import memoize_attention, records_of
from whet.passes.quantise import QuantisationConfig, quantise

HITS = range(9, len(BATCH))
"""What comes before them is computed."""


def quantised(batch=None):
    batch = batch or requests(20, 30)
    return quantise(build(classifier), QuantisationConfig(), batch, [b * 0 for b in batch], lambda _: None)


def record(request, call, **changed):
    """What a module keeps of a request."""
    tiles, quads = (-(-len(request) // size) for size in (16, 4))
    made = aligned(np.zeros((LAYERS, HEADS, tiles, quads, 64), np.uint8))
    call([request], True, [[0, made.data_ptr()]], **changed)
    return made


def using(made, hits):
    """Records of a batch whose requests ``hits`` use some."""
    return [[m.data_ptr() if i in hits else 0, 0] for i, m in enumerate(made)]


@pytest.mark.parametrize(("activations", "sparsity"), [("per_token", 0.0), ("static", 0.75)])
def test_hits_of_the_same_tokens_and_misses_keep_their_bits(activations, sparsity):
    plain = compiled(activations, sparsity=sparsity)(BATCH, True)
    call = compiled(activations, sparsity=sparsity, memo=True)
    np.testing.assert_array_equal(call(BATCH, True), plain)
    made = [record(request, call) for request in BATCH]
    assert all(m.numpy().any(axis=(1, 2, 3, 4)).all() for m in made)
    for hits in (HITS, range(len(BATCH))):
        np.testing.assert_array_equal(call(BATCH, True, using(made, hits)), plain)
    for request, m, answer in zip(BATCH, made, plain, strict=True):
        np.testing.assert_array_equal(call([request], True, using([m], [0]))[0], answer)


@pytest.mark.parametrize(("activations", "sparsity"), [("per_token", 0.0), ("static", 0.75)])
def test_with_caches_hits_and_misses_leave_early_and_the_others_keep_their_bits(activations, sparsity):
    memo, frozen, both = (
        compiled(activations, sparsity=sparsity, **options)
        for options in ({"memo": True}, {"freeze": True}, {"memo": True, "freeze": True})
    )
    nobody = exits(after0=2.0, after2=2.0)
    np.testing.assert_array_equal(both(BATCH, True, exits=nobody)[:, :LABELS], memo(BATCH, True))
    expected = frozen(BATCH, True)
    np.testing.assert_array_equal(both(BATCH, True), expected)
    own = [record(request, memo) for request in BATCH]
    for one, other in zip(own, (record(request, both, exits=nobody) for request in BATCH), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    np.testing.assert_array_equal(both(BATCH, True, using(own, HITS)), expected)
    # Records of others: those who use them get other answers, and may leave elsewhere.
    foreign = [record(request[::-1], memo) for request in BATCH]
    for hits in (HITS, range(len(BATCH)), range(18, 19)):
        used = using(foreign, hits)
        told = {
            0: both(BATCH, True, used, exits=exits(after0=0.0))[:, :LABELS],
            2: both(BATCH, True, used, exits=exits(after0=2.0, after2=0.0))[:, :LABELS],
            LAYERS: memo(BATCH, True, used),
        }
        some = halving(told)
        left = leavers(told, some)
        assert set(left.tolist()) == {0, 2, 3}
        got = both(BATCH, True, used, exits=some)
        np.testing.assert_array_equal(got[:, LABELS], left)
        np.testing.assert_array_equal(got[:, :LABELS], [told[layer][i] for i, layer in enumerate(left)])
        changed = (told[LAYERS] != memo(BATCH, True)).any(axis=1)
        assert changed[list(hits)].mean() > 0.5 and not np.delete(changed, list(hits)).any()
    # All that are computed leave at once and those with records stay, and the other way round.
    for first, second in ([0, LAYERS], [LAYERS, 0], [0, 2], [2, LAYERS], [0, 0]):
        misses, hits = ([i for i, layer in enumerate(expected[:, LABELS]) if layer == at] for at in (first, second))
        order = [*misses, *hits]
        used = using([own[i] for i in order], range(len(misses), len(order)))
        np.testing.assert_array_equal(both([BATCH[i] for i in order], True, used), expected[order])


def test_another_record_changes_the_answer_of_its_user_alone():
    call = compiled("per_token", memo=True)
    plain = compiled("per_token")(BATCH, True)
    other = record(requests(500, 31)[1], call)
    got = call(BATCH, True, using([other] * len(BATCH), [17]))
    same = (got == plain).all(axis=1)
    assert not same[17]
    assert same.sum() == len(BATCH) - 1


def test_without_records_it_means_the_same():
    module = quantised()
    memoized = memoize_attention(module)
    assert ops(memoized).count("memoized_attention") == LAYERS
    assert ops(memoized).count("divide") == 2
    np.testing.assert_array_equal(interpret(memoized, BATCH), interpret(module, BATCH))


def test_records_belong_to_weights_and_scales():
    module = quantised()
    of = records_of(module)
    assert (of.layers, of.heads) == (LAYERS, HEADS)
    assert records_of(quantised()) == of
    assert records_of(quantised(requests(5, 40))).identity != of.identity


def test_refusals():
    with pytest.raises(ValueError, match="needs int8 attention"):
        memoize_attention(build(classifier))
    with pytest.raises(ValueError, match="needs transformer layers"):
        memoize_attention(build(lambda b: b.dense(b.embed(CHANNELS), 8, "logits")))
