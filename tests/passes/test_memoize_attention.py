"""Attention that uses records of earlier requests: the bits of all answers, in batches of hits and misses."""

import functools

import numpy as np
import pytest
from execute import aligned, pack
from graphs import build, ops, requests
from test_freeze_layers import CHANNELS, LAYERS, classifier

from whet.codegen import generate_code
from whet.link import Blob
from whet.passes.assemble import assemble
from whet.passes.interpret import interpret
from whet.passes.memoize_attention import memoize_attention, records_of
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig, quantise
from whet.progress import Silent
from whet.schedules.isa import isa

HEADS = 2
ISA = isa("avx2")
BATCH = requests(20, 3, 16, 1, 33, 5, 16, 16, 7, 50, 2, 12, 40, 9, 4, 18, 6, 31, 8)
HITS = range(9, len(BATCH))
"""What follows them is computed."""


@functools.cache
def compiled(activations, memo=True, sparsity=0.0):
    batch = requests(20, 30)
    options = Options((ISA,), 64, QuantisationConfig(activations=activations), memo=memo, sparsity=sparsity)
    lowered = run_pipeline(build(classifier), options, batch, [b * 0 for b in batch], Silent())[0].lowered
    weights = Blob()
    offsets = [weights.add(*weight).offset for weight in lowered.weights]
    assembled = assemble(lowered.module, offsets)
    blob = aligned(np.frombuffer(b"".join(weights.pieces()), np.uint8))
    return generate_code(assembled.module, ISA), assembled.workspace, blob


def run(batch, activations, memo=True, records=None, sparsity=0.0):
    """Logits of each request; ``records`` are addresses to use and to keep at, ``(requests, 2)``."""
    executable, workspace, blob = compiled(activations, memo, sparsity)
    inputs = pack(batch)
    tiles, groups = inputs[0].shape[0], inputs[3].shape[0]
    if memo:
        addresses = np.zeros((groups * 16, 2), np.int64)
        if records is not None:
            addresses[: len(batch)] = records
        inputs.append(aligned(addresses.reshape(groups, 16, 2)))
    scratch = aligned(np.full(tiles * workspace.per_tile + groups * workspace.per_group + 1, 0xA5, np.uint8))
    out = aligned(np.zeros((groups, 5, 16), np.float32))
    executable["main"](*inputs, blob, scratch, out)
    return out.numpy().transpose(0, 2, 1).reshape(-1, 5)[: len(batch)]


def room(request):
    n = len(request)
    return aligned(np.zeros((LAYERS, HEADS, -(-n // 16), -(-n // 4), 64), np.uint8))


def quantised(batch=None):
    batch = batch or requests(20, 30)
    return quantise(build(classifier), QuantisationConfig(), batch, [b * 0 for b in batch], lambda _: None)


def record(request, activations, **options):
    made = room(request)
    run([request], activations, records=[[0, made.data_ptr()]], **options)
    return made


@pytest.mark.parametrize(("activations", "options"), [("per_token", {}), ("static", {"sparsity": 0.75})], ids=str)
def test_hits_of_the_same_tokens_and_misses_keep_their_bits(activations, options):
    plain = run(BATCH, activations, memo=False, **options)
    np.testing.assert_array_equal(run(BATCH, activations, **options), plain)
    made = [record(request, activations, **options) for request in BATCH]
    assert all(m.numpy().any(axis=(1, 2, 3, 4)).all() for m in made)
    for hits in (HITS, range(len(BATCH))):
        addresses = [[made[i].data_ptr() if i in hits else 0, 0] for i in range(len(BATCH))]
        np.testing.assert_array_equal(run(BATCH, activations, records=addresses, **options), plain)
    for request, m, answer in zip(BATCH, made, plain, strict=True):
        np.testing.assert_array_equal(run([request], activations, records=[[m.data_ptr(), 0]], **options)[0], answer)


def test_another_record_changes_the_answer_of_its_user_alone():
    plain = run(BATCH, "per_token", memo=False)
    other = record(requests(500, 31)[1], "per_token")
    addresses = np.zeros((len(BATCH), 2), np.int64)
    addresses[17, 0] = other.data_ptr()
    got = run(BATCH, "per_token", records=addresses)
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
