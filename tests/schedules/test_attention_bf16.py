"""Attention with bfloat16 products over packed requests: near float64, no influence of neighbours."""

import numpy as np
import oracles
import pytest

from whet.runtime.cpu import request_amx
from whet.schedules import attention_amx, bfloat16
from whet.schedules import isa as isas
from whet.schedules.attention import AttentionKnobs, AttentionSpec, attention

MAX_LENGTH = 600


def data(rng, tokens, channels, size=1.5):
    return [bfloat16.rounded(rng.normal(0, size, (tokens, channels)).astype("float32")) for _ in range(3)]


def to_pairs(rows):
    tiles = bfloat16.to_bits(oracles.to_tiles(rows))
    return np.ascontiguousarray(tiles.reshape(len(tiles), -1, 2, 16).transpose(0, 1, 3, 2))


def run_bf16(isa, heads, rows, segments, scale, knobs=None, **more):
    tokens, channels = rows[0].shape
    spec = AttentionSpec(heads, channels // heads, "bf16", MAX_LENGTH, scale, **more)
    kernel = oracles.build(attention, spec, isa, *([knobs] if knobs else []))
    if "amx" in isa and (refusal := request_amx()):
        pytest.skip(refusal)
    q, k, v = (oracles.fill_last_tile(x) for x in rows)
    inputs = [to_pairs(q), to_pairs(k), bfloat16.to_bits(oracles.to_tiles(v)), segments]
    (out,) = oracles.run(kernel, inputs, [(inputs[0].shape, "uint16")])
    return oracles.from_pairs(out, tokens)


def check(isa, heads, rows, segments, scale, atol=0.02):
    """Against float64 with probabilities rounded as the kernel does, up to those that fall the other way."""
    got = run_bf16(isa, heads, rows, segments, scale)
    q, k, v = (x.astype("float64") for x in rows)
    size = q.shape[1] // heads
    for _, tokens in oracles.requests_of(segments):
        for c in (slice(h * size, (h + 1) * size) for h in range(heads)):
            scores = scale * (q[tokens, c] @ k[tokens, c].T)
            p = bfloat16.rounded(np.exp(scores - scores.max(1, keepdims=True)).astype("float32"))
            want = p @ v[tokens, c] / p.sum(1, keepdims=True)
            np.testing.assert_allclose(got[tokens, c], want, rtol=2**-8, atol=atol)
            assert np.abs(got[tokens, c] - want).mean() < 4e-3


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
@pytest.mark.parametrize(("heads", "size"), [(2, 8), (3, 12), (2, 32), (1, 64), (1, 100)])
def test_mixed_lengths(isa, heads, size):
    rows = data(np.random.default_rng(size), sum(oracles.MIXED), heads * size)
    check(isa, heads, rows, oracles.segments_of(oracles.MIXED, gaps=[0, 2, len(oracles.MIXED)]), size**-0.5)


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_first_tiles_alone(isa):
    rows, segments = data(np.random.default_rng(3), 5 + sum(oracles.MIXED), 64), oracles.segments_of(oracles.MIXED, 5)
    whole, first = (run_bf16(isa, 2, rows, segments, 0.2, first_only=only) for only in (False, True))
    oracles.check_first_tiles(segments, first, whole, np.nan)


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 32, 33, 47, 63, 64, 65, 383, 599, 600])
def test_lengths(isa, length):
    rows = data(np.random.default_rng(length), length, 32)
    check(isa, 1, rows, oracles.segments_of([length]), 0.2)


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_longest_request_at_every_alignment(isa):
    """And it has the same bytes at each."""
    rows = data(np.random.default_rng(0), MAX_LENGTH, 32)
    results = []
    for first in range(16):
        moved = [np.concatenate([np.full((first, 32), 7, "float32"), x]) for x in rows]
        results.append(run_bf16(isa, 1, moved, oracles.segments_of([MAX_LENGTH], first), 0.2)[first:])
        np.testing.assert_array_equal(results[0], results[-1])


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_request_alone_gives_the_same_bytes(isa):
    rows = data(np.random.default_rng(1), sum(oracles.MIXED), 32)
    segments = oracles.segments_of(oracles.MIXED)
    together = run_bf16(isa, 1, rows, segments, 0.2)
    for i, tokens in oracles.requests_of(segments):
        first = i * 5 % 16
        moved = [np.concatenate([np.full((first, 32), 7, "float32"), x[tokens]]) for x in rows]
        alone = run_bf16(isa, 1, moved, oracles.segments_of([tokens.stop - tokens.start], first), 0.2)
        np.testing.assert_array_equal(alone[first:], together[tokens])


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_neighbours_that_are_not_finite_do_no_harm(isa):
    rows = data(np.random.default_rng(3), 60, 32)
    segments = oracles.segments_of([9, 41, 10])
    clean = run_bf16(isa, 1, rows, segments, 0.2)
    for x in rows:
        x[:9] = x[50:] = np.nan
    np.testing.assert_array_equal(run_bf16(isa, 1, rows, segments, 0.2)[9:50], clean[9:50])


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
@pytest.mark.parametrize("size", [0, 30, 1e4, 1e15])
def test_extreme_scores(isa, size):
    rows = data(np.random.default_rng(0), 80, 32, size)
    rows[2] = data(np.random.default_rng(1), 80, 32)[2]
    got = run_bf16(isa, 1, rows, oracles.segments_of([33, 40, 7]), 1.0)
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= np.abs(rows[2]).max() * (1 + 2**-7)


@pytest.mark.parametrize("isa", oracles.BF16_NAMES)
def test_knobs_change_the_code_but_not_the_result(isa):
    rows = data(np.random.default_rng(2), 5 + sum(oracles.MIXED), 2 * 32)
    arguments = (2, rows, oracles.segments_of(oracles.MIXED, 5), 0.2)
    first, *others = [run_bf16(isa, *arguments, k)[5:] for k in (None, AttentionKnobs(1, 8, unit=1))]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_amx_takes_heads_that_fill_its_registers():
    for size, taken in ((32, True), (64, True), (16, False), (48, False), (96, False)):
        spec = AttentionSpec(2, size, "bf16", 128)
        assert attention_amx.supports(spec, isas.isa("amx_bf16")) == taken
        assert not any(attention_amx.supports(spec, isas.isa(name)) for name in ("amx_int8", "avx512_bf16"))


def test_refusals():
    with pytest.raises(ValueError, match="head_size is 30; bf16 attention"):
        AttentionSpec(2, 30, "bf16", 128)
    with pytest.raises(ValueError, match="avx2 has no products of bfloat16"):
        attention(AttentionSpec(2, 32, "bf16", 128), isas.isa("avx2"))
