"""Attention in float32 over packed requests: near float64, no influence of neighbours, no NaN."""

import numpy as np
import oracles
import pytest

from whet.schedules.attention import AttentionSpec, attention

MAX_LENGTH = 600


def run_f32(isa, heads, rows, segments, scale):
    tokens, channels = rows.shape
    spec = AttentionSpec(heads, channels // 3 // heads, "f32", MAX_LENGTH, scale)
    tiles = oracles.to_tiles(oracles.fill_last_tile(rows))
    (out,) = oracles.run(
        oracles.build(attention, spec, isa), [tiles, segments], [((len(tiles), channels // 3, 16), "float32")]
    )
    assert np.isfinite(out).all()
    assert (oracles.from_tiles(out)[tokens:] == 0).all()
    return oracles.from_tiles(out, tokens)


def expected_f32(heads, rows, segments, scale):
    channels = rows.shape[1] // 3
    q, k, v = np.split(rows.astype("float64"), 3, axis=1)
    size = channels // heads
    out = np.zeros((len(rows), channels))
    for _, tokens in oracles.requests_of(segments):
        for c in (slice(h * size, (h + 1) * size) for h in range(heads)):
            scores = scale * (q[tokens, c] @ k[tokens, c].T)
            p = np.exp(scores - scores.max(1, keepdims=True))
            out[tokens, c] = p @ v[tokens, c] / p.sum(1, keepdims=True)
    return out


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2"])
def test_f32_first_tiles_alone(isa):
    rows = np.random.default_rng(3).normal(0, 1, (5 + sum(oracles.MIXED), 3 * 24)).astype("float32")
    segments, tiles = oracles.segments_of(oracles.MIXED, 5), oracles.to_tiles(oracles.fill_last_tile(rows))
    whole, first = (
        oracles.run(
            oracles.build(attention, AttentionSpec(2, 12, "f32", MAX_LENGTH, 0.3, only), isa),
            [tiles, segments],
            [((len(tiles), 24, 16), "float32")],
        )[0]
        for only in (False, True)
    )
    starts = [tokens.start for _, tokens in oracles.requests_of(segments)]
    got, wanted = (oracles.from_tiles(x, len(rows)) for x in (first, whole))
    np.testing.assert_array_equal(got[starts], wanted[starts])
    assert np.isnan(got).all(axis=1).sum() > len(rows) // 4


@pytest.mark.parametrize(
    ("isa", "heads", "size"), [("avx512_vnni", 2, 8), ("avx512_vnni", 1, 13), ("avx512_vnni", 2, 64), ("avx2", 3, 12)]
)
def test_f32_mixed_lengths(isa, heads, size):
    rows = np.random.default_rng(size).normal(0, 1.5, (sum(oracles.MIXED), 3 * heads * size)).astype("float32")
    segments, scale = oracles.segments_of(oracles.MIXED, gaps=[2]), size**-0.5
    got = run_f32(isa, heads, rows, segments, scale)
    np.testing.assert_allclose(got, expected_f32(heads, rows, segments, scale), atol=5e-6)


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2"])
def test_f32_longest_request(isa):
    rows = np.random.default_rng(0).normal(0, 1.5, (5 + MAX_LENGTH, 3 * 16)).astype("float32")
    segments = oracles.segments_of([MAX_LENGTH], first=5)
    np.testing.assert_allclose(run_f32(isa, 1, rows, segments, 0.25), expected_f32(1, rows, segments, 0.25), atol=5e-6)


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2"])
@pytest.mark.parametrize("size", [0, 30, 1e4, 1e15])
def test_f32_extreme_scores(isa, size):
    rows = (np.random.default_rng(0).normal(size=(40, 3 * 8)) * size).astype("float32")
    segments = oracles.segments_of([33, 7])
    got = run_f32(isa, 1, rows, segments, 1.0)
    if size <= 30:
        np.testing.assert_allclose(got, expected_f32(1, rows, segments, 1.0), atol=1e-3)


def test_f32_request_alone_gives_the_same_bits_on_every_instruction_set():
    rows = np.random.default_rng(0).normal(0, 1.5, (sum(oracles.MIXED), 3 * 24)).astype("float32")
    segments = oracles.segments_of(oracles.MIXED)
    together = run_f32("avx512_vnni", 2, rows, segments, 0.3)
    np.testing.assert_array_equal(together, run_f32("avx2", 2, rows, segments, 0.3))
    for i, tokens in oracles.requests_of(segments):
        first = i * 5 % 16
        moved = np.concatenate([np.full((first, 72), 7, "float32"), rows[tokens]])
        alone = run_f32("avx512_vnni", 2, moved, oracles.segments_of([tokens.stop - tokens.start], first), 0.3)
        np.testing.assert_array_equal(alone[first:], together[tokens])
