"""Attention with probabilities of earlier requests: against the plain kernel, to the bit, and NumPy."""

import numpy as np
import oracles
import pytest
from test_attention import expected_i8, int8_data

from whet.runtime.cpu import request_amx
from whet.schedules.attention import AttentionSpec, attention
from whet.schedules.attention_memoized import KEEP, USE, DivideSpec, divide, memoized_attention

NAMES = ("amx_int8", *oracles.NAMES)
LAYER, LAYERS = 1, 2
HEADS, SIZE = 3, 16
SPEC = AttentionSpec(HEADS, SIZE, "i8", 200)
PARAMS = np.array([3e-5, 1.3, 120, 0], "float32")
LENGTHS = [1, 4, 16, 17, 33, 100, 128, 199, 200]


def built(generator, spec, isa):
    kernel = oracles.build(generator, spec, isa)
    if isa == "amx_int8" and (refusal := request_amx()):
        pytest.skip(refusal)
    return kernel


def record(length):
    """Room for a record: bytes (layers, heads, tiles of queries, quads of keys, 16 queries, 4 keys)."""
    return oracles.aligned(np.zeros((LAYERS, HEADS, -(-length // 16), -(-length // 4), 16, 4), "uint8"))


def run(isa, rows, segments, records=None):
    """Run both kernels as a module does; ``records`` are pairs of arrays or None, one for each entry."""
    q, k, v = (oracles.fill_last_tile(x) for x in rows)
    addresses = np.zeros((segments.size // 2, 2), "int64")
    for i, pair in enumerate(records or []):
        addresses[i] = [0 if array is None else array.ctypes.data for array in pair]
    addresses = addresses.reshape(segments.shape)
    tiles = len(q) // 16
    (computed, first), (stored, last) = (divided(isa, which, tiles, segments, addresses) for which in (False, True))
    inputs = [x[:first] for x in (oracles.to_quads(q), oracles.to_quads(k), oracles.to_tiles(v))]
    inputs += [computed, oracles.to_tiles(v)[tiles - last :], stored, addresses, PARAMS, np.array([LAYER], "int32")]
    (out,) = oracles.run(built(memoized_attention, SPEC, isa), inputs, [((tiles, HEADS * SIZE // 4, 16, 4), "uint8")])
    return oracles.from_quads(out)


def divided(isa, stored, tiles, segments, addresses):
    """Segments of one side, and its tiles."""
    kernel = built(divide, DivideSpec(stored), isa)
    outputs = [(segments.shape, "int32"), ((tiles,), "int8"), ((2,), "int32")]
    kept, _, (groups, left) = oracles.run(kernel, [np.zeros((tiles, 16), "int32"), segments, addresses], outputs)
    return kept[:groups], left


def plain(isa, rows, segments):
    q, k, v = (oracles.fill_last_tile(x) for x in rows)
    inputs = [oracles.to_quads(q), oracles.to_quads(k), oracles.to_tiles(v), segments, PARAMS]
    (out,) = oracles.run(built(attention, SPEC, isa), inputs, [(inputs[0].shape, "uint8")])
    return oracles.from_quads(out)


def kept(isa, rows):
    """The record of one request."""
    made = record(len(rows[0]))
    run(isa, rows, oracles.segments_of([len(rows[0])]), [(None, made)])
    return made


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_record_holds_the_probabilities(isa, length):
    rows = int8_data(np.random.default_rng(length), length, HEADS * SIZE)
    made = kept(isa, rows)
    assert not made[1 - LAYER].any()
    # Queries, then keys.
    p = made[LAYER].transpose(0, 1, 3, 2, 4).reshape(HEADS, made.shape[2] * 16, -1)[:, :length]
    assert not p[:, :, length:].any()
    assert (p.max(axis=2) == 255).all()
    p = p[:, :, :length].astype("float64")
    v = rows[2].reshape(length, HEADS, SIZE).transpose(1, 0, 2)
    context = ((p @ v) / p.sum(2, keepdims=True)).transpose(1, 0, 2).reshape(length, -1)
    expected = np.clip(np.rint(PARAMS[1] * context + PARAMS[2]), 0, 255)
    segments = oracles.segments_of([length])
    assert np.abs(expected - plain(isa, rows, segments)[:length]).max() <= 1
    assert np.abs(expected - expected_i8(HEADS, rows, segments, PARAMS)).max() <= 1


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_repeat_gets_the_same_bytes_wherever_it_starts(isa, length):
    rows = int8_data(np.random.default_rng(length), length, HEADS * SIZE)
    made = kept(isa, rows)
    for first in range(16):
        moved = [np.concatenate([np.full((first, HEADS * SIZE), 77, x.dtype), x]) for x in rows]
        segments = oracles.segments_of([length], first)
        used = run(isa, moved, segments, [(made, None)])
        np.testing.assert_array_equal(used[first:][:length], plain(isa, moved, segments)[first:][:length])


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("which", ["none", "all", "first", "last", "middle"])
def test_hits_and_misses_in_one_batch(isa, which):
    rng = np.random.default_rng(3)
    lengths = oracles.MIXED
    rows = int8_data(rng, sum(lengths), HEADS * SIZE)
    segments = oracles.segments_of(lengths, gaps=[0, 5])
    hits = {
        "none": lambda i: False,
        "all": lambda i: True,
        "first": lambda i: i < 10,
        "last": lambda i: i > 10,
        "middle": lambda i: 4 < i < 20 and i != 10,
    }[which]
    records = [(None, None)] * (segments.size // 2)
    for i, tokens in oracles.requests_of(segments):
        if hits(i):
            records[i] = kept(isa, [x[tokens] for x in rows]), None
    got, wanted = run(isa, rows, segments, records), plain(isa, rows, segments)
    np.testing.assert_array_equal(got[: sum(lengths)], wanted[: sum(lengths)])


@pytest.mark.parametrize("isa", NAMES)
def test_another_request_s_probabilities_are_used_as_they_are(isa):
    rng = np.random.default_rng(4)
    first, second = (int8_data(rng, 50, HEADS * SIZE) for _ in range(2))
    made = kept(isa, first)
    segments = oracles.segments_of([50])
    got = run(isa, second, segments, [(made, None)])
    # Values of the second, all else of the first.
    np.testing.assert_array_equal(got[:50], plain(isa, [*first[:2], second[2]], segments)[:50])


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_divide(isa):
    segments = oracles.segments_of([20, 30, 5, 40, 1, 1, *[3] * 20], gaps=[2])
    records = np.zeros((*segments.shape[:2], 2), "int64")
    flat = records.reshape(-1, 2)
    flat[4:, USE] = 64
    flat[1, USE], flat[0, KEEP] = 64, 64
    computed, first = divided(isa, False, 10, segments, records)
    stored, last = divided(isa, True, 10, segments, records)
    assert computed[0, :, 1].tolist() == [20, 0, 0, 5] + [0] * 12
    assert stored.reshape(-1, 2)[:8, 1].tolist() == [0, 30, 0, 0, 40, 1, 1, 3]
    assert (len(computed), len(stored)) == (1, 2)
    assert (first, last) == (4, 9)  # entry 3 ends with token 54, entry 1 begins with token 20
    np.testing.assert_array_equal(stored[:, :, 0], segments[:, :, 0])


def test_only_int8_has_records():
    with pytest.raises(ValueError, match="precision is 'bf16'"):
        memoized_attention(AttentionSpec(2, 16, "bf16", 64), None)
