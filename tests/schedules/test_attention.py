"""Attention with int8 products over packed requests: exact integers, no influence of neighbours."""

import numpy as np
import oracles
import pytest

from whet.runtime.cpu import request_amx
from whet.schedules import attention_amx
from whet.schedules import isa as isas
from whet.schedules.attention import AttentionKnobs, AttentionSpec, attention

MAX_LENGTH = 600
NAMES = ("amx_int8", *oracles.NAMES)


def int8_data(rng, tokens, channels, low=-127, high=128):
    q = rng.integers(low + 128, high + 127, (tokens, channels)).astype("uint8")
    k, v = (rng.integers(low, high, (tokens, channels)).astype("int8") for _ in range(2))
    return q, k, v


def run_i8(isa, heads, rows, segments, params, knobs=None, **more):
    tokens, channels = rows[0].shape
    spec = AttentionSpec(heads, channels // heads, "i8", MAX_LENGTH, **more)
    kernel = oracles.build(attention, spec, isa, *([knobs] if knobs else []))
    if isa == "amx_int8" and (refusal := request_amx()):
        pytest.skip(refusal)
    q, k, v = (oracles.fill_last_tile(x) for x in rows)
    inputs = [oracles.to_quads(q), oracles.to_quads(k), oracles.to_tiles(v), segments, np.array(params, "float32")]
    (out,) = oracles.run(kernel, inputs, [(inputs[0].shape, "uint8")])
    return oracles.from_quads(out, tokens)


def expected_i8(heads, rows, segments, params):
    q, k, v = (x.astype("int64") for x in rows)
    out = np.zeros(q.shape)
    size = q.shape[1] // heads
    factor, scale, zero, _ = np.array(params, "float32").astype("float64")
    for _, tokens in oracles.requests_of(segments):
        for c in (slice(h * size, (h + 1) * size) for h in range(heads)):
            scores = (q[tokens, c] - 128) @ k[tokens, c].T
            p = np.rint(255 * np.exp(factor * (scores - scores.max(1, keepdims=True))))
            out[tokens, c] = scale * (p @ v[tokens, c]) / p.sum(1, keepdims=True) + zero
    return np.clip(np.rint(out), 0, 255)


def check_i8(isa, heads, rows, segments, params, within=1):
    got = run_i8(isa, heads, rows, segments, params).astype(int)
    used = np.concatenate([np.arange(t.start, t.stop) for _, t in oracles.requests_of(segments)])
    difference = np.abs(got - expected_i8(heads, rows, segments, params))[used]
    assert difference.max() <= within
    return difference


SHAPES = [(2, 8), (3, 12), (2, 28), (1, 32), (1, 64), (1, 100), (1, 256)]


@pytest.mark.parametrize(
    ("isa", "heads", "size"),
    [("avx512_vnni", *shape) for shape in SHAPES]
    + [("avx_vnni", 2, 28), ("avx2", 3, 12), ("avx2", 1, 64)]
    + [("amx_int8", *shape) for shape in ((3, 16), (1, 32), (2, 48), (1, 64))],
)
def test_i8_mixed_lengths(isa, heads, size):
    rng = np.random.default_rng(size)
    rows = int8_data(rng, sum(oracles.MIXED), heads * size)
    difference = check_i8(isa, heads, rows, oracles.segments_of(oracles.MIXED), [1.5e-4 / size, 1, 128, 0])
    assert (difference > 0).mean() < 0.02  # a rounding of a probability that fell the other way


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 383, 599, 600])
def test_i8_lengths(isa, length):
    rows = int8_data(np.random.default_rng(length), length, 32)
    check_i8(isa, 1, rows, oracles.segments_of([length]), [5e-6, 1, 128, 0])


@pytest.mark.parametrize("isa", NAMES)
def test_i8_longest_request_at_every_alignment(isa):
    for first in range(16):
        rows = int8_data(np.random.default_rng(first), first + MAX_LENGTH, 32)
        check_i8(isa, 1, rows, oracles.segments_of([MAX_LENGTH], first), [5e-6, 3, 128, 0], within=2)


@pytest.mark.parametrize("isa", NAMES)
def test_i8_unused_entries(isa):
    rows = int8_data(np.random.default_rng(0), sum(oracles.MIXED), 32)
    segments = oracles.segments_of(oracles.MIXED, gaps=[0, 1, 7, len(oracles.MIXED)])
    check_i8(isa, 1, rows, segments, [5e-6, 1, 128, 0])


@pytest.mark.parametrize("isa", NAMES)
def test_i8_saturation(isa):
    """The largest products, where 16-bit sums would overflow, and scores of millions."""
    rng = np.random.default_rng(0)
    q = rng.choice([0, 255], (70, 64)).astype("uint8")
    k, v = (rng.choice([-127, 127], (70, 64)).astype("int8") for _ in range(2))
    for factor in (1e-30, 1e-9, 1e-6, 1e-2, 1.0):
        check_i8(isa, 1, (q, k, v), oracles.segments_of([40, 30]), [factor, 1, 128, 0])
    got = run_i8(isa, 1, (q, k, v), oracles.segments_of([40, 30]), [1e-6, 100, 128, 0])
    assert got.min() == 0
    assert got.max() == 255


@pytest.mark.parametrize("isa", NAMES)
def test_i8_equal_scores_average(isa):
    _, _, v = int8_data(np.random.default_rng(0), 50, 32)
    q, k = np.full((50, 32), 128, "uint8"), np.full((50, 32), 5, "int8")
    got = run_i8(isa, 1, (q, k, v), oracles.segments_of([50]), [1e-3, 1, 128, 0])
    np.testing.assert_array_equal(got, np.tile(np.rint(v.astype(int).sum(0) / np.float32(50) + 128), (50, 1)))


@pytest.mark.parametrize("isa", NAMES)
def test_i8_request_alone_gives_the_same_bytes(isa):
    rows = int8_data(np.random.default_rng(1), sum(oracles.MIXED), 32)
    segments, params = oracles.segments_of(oracles.MIXED), [1e-5, 2, 120, 0]
    together = run_i8(isa, 1, rows, segments, params)
    for i, tokens in oracles.requests_of(segments):
        first = i * 5 % 16
        moved = [np.concatenate([np.full((first, 32), 77, x.dtype), x[tokens]]) for x in rows]
        alone = run_i8(isa, 1, moved, oracles.segments_of([tokens.stop - tokens.start], first), params)
        np.testing.assert_array_equal(alone[first:], together[tokens])


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("unit", [1, 4])
def test_i8_first_tiles_alone(isa, unit):
    rows = int8_data(np.random.default_rng(3), 5 + sum(oracles.MIXED), 2 * 48)
    segments, knobs = oracles.segments_of(oracles.MIXED, 5), AttentionKnobs(2, 8, unit)
    whole, first = (
        run_i8(isa, 2, rows, segments, [1.5e-5, 2, 120, 0], knobs, first_only=only) for only in (False, True)
    )
    oracles.check_first_tiles(segments, first, whole, 255)


@pytest.mark.parametrize("lengths", [oracles.MIXED, *([length] for length in (33, 63, 64, 65, 128, 384, 512))], ids=str)
def test_i8_instruction_sets_and_knobs_agree(lengths):
    rows = int8_data(np.random.default_rng(2), 5 + sum(lengths), 2 * 48)
    arguments = (2, rows, oracles.segments_of(lengths, 5), [1.5e-5, 2, 120, 0])
    results = [run_i8(isa, *arguments) for isa in oracles.several()]
    results += [run_i8("avx512_vnni", *arguments, AttentionKnobs(1, 4, unit=1))]
    if not request_amx():
        results += [run_i8("amx_int8", *arguments, knobs) for knobs in (None, AttentionKnobs(2, 16, unit=1))]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0][5:], other[5:])


def test_amx_takes_heads_that_fill_its_registers():
    for size, taken in ((16, True), (64, True), (28, False), (128, False)):
        spec = AttentionSpec(2, size, "i8", 128)
        assert attention_amx.supports(spec, isas.isa("amx_int8")) == taken
        assert not attention_amx.supports(spec, isas.isa("avx512_vnni"))


def test_refusals():
    with pytest.raises(ValueError, match="head_size is 30"):
        AttentionSpec(2, 30, "i8", 128)
    with pytest.raises(ValueError, match="precision is 'i4'"):
        AttentionSpec(2, 32, "i4", 128)
    with pytest.raises(ValueError, match="max_length is 0"):
        AttentionSpec(2, 32, "i8", 0)
