"""The look-up in a memo file against NumPy, which tells the same record and nearly the same distance."""

from functools import cache

import numpy as np
import oracles
import pytest

from whet.schedules.nearest_record import DIMENSIONS, key, nearest

WORDS, PLACES = 90, 70
LENGTHS = [1, 2, 5, 16, 17, 40, 70]
"""Of records, many of each."""


@pytest.fixture(scope="module")
def world():
    """Vectors, signs, and requests ``(2, length)``: every third is near another of its length."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 1, (WORDS, DIMENSIONS)).astype("float32")
    signs = rng.choice([-1, 1], (PLACES, DIMENSIONS)).astype("int8")
    requests = []
    for length in LENGTHS * 12:
        types = np.arange(length) >= rng.choice([length // 2, length])
        tokens = np.stack([rng.integers(0, WORDS, length), types]).astype("int32")
        if len(requests) % 3 == 0 and len(requests) >= len(LENGTHS):
            tokens = requests[-len(LENGTHS)].copy()
            tokens[0, rng.integers(length)] = rng.integers(WORDS)
        requests.append(tokens)
    return vectors, signs, requests


def key_of(vectors, signs, tokens):
    by_type = np.where(tokens[1] % 2, -1.0, 1.0)[:, None]
    rows = vectors[tokens[0]].astype("float64") * signs[: tokens.shape[1]] * by_type
    return rows.sum(axis=0) / np.sqrt(tokens.shape[1])


def distance_of(vectors, a, b):
    if (a[1] != b[1]).any():
        return np.inf
    return np.sqrt(np.square(vectors[a[0]].astype("float64") - vectors[b[0]]).sum() / a.shape[1])


def packed(requests):
    lengths = np.array([r.shape[1] for r in requests])
    segments = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("int32")
    return np.concatenate(requests, axis=1), segments


def keys_of(isa, vectors, signs, requests):
    return oracles.run(
        build(key, isa), [*packed(requests), vectors, signs], [((len(requests), DIMENSIONS), "float32")]
    )[0]


def of_a_file(requests):
    """What a file has of records, written in any order: the last five arguments before the outputs, without keys."""
    lengths = np.array([r.shape[1] for r in requests])
    order = np.argsort(lengths, kind="stable")
    begin = np.searchsorted(lengths[order], np.arange(PLACES + 2))
    sizes = 2 * lengths + 3  # records hold more than tokens
    starts = np.cumsum(sizes) - sizes
    words = np.full(sizes.sum(), -1, "int32")
    for start, tokens in zip(starts, requests, strict=True):
        words[start : start + tokens.size] = tokens.reshape(-1)
    entries = np.stack([4 * starts, lengths, lengths], axis=1)
    return order.astype("int64"), begin.astype("int64"), entries.astype("int64"), words


@cache
def build(kernel, isa):
    return oracles.build(lambda _, isa: kernel(isa), None, isa)


def look_up(isa, vectors, signs, records, asked):
    inputs = [*packed(asked), vectors, signs, keys_of(isa, vectors, signs, records), *of_a_file(records)]
    outputs = [((len(asked),), "int64"), ((len(asked),), "float32")]
    return oracles.run(build(nearest, isa), inputs, outputs)


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_keys(isa, world):
    vectors, signs, requests = world
    wanted = [key_of(vectors, signs, tokens) for tokens in requests]
    np.testing.assert_allclose(keys_of(isa, vectors, signs, requests), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_nearest(isa, world):
    vectors, signs, requests = world
    records, asked = requests[:50], [*requests[50:], requests[7], np.zeros((2, 3), "int32"), np.zeros((2, 0), "int32")]
    numbers, distances = look_up(isa, vectors, signs, records, asked)
    keys = np.array([key_of(vectors, signs, tokens) for tokens in records])
    for tokens, number, distance in zip(asked, numbers, distances, strict=True):
        same = [i for i, r in enumerate(records) if r.shape == tokens.shape]
        if not same:
            assert (number, distance) == (-1, np.inf)
            continue
        away = np.square(keys[same] - key_of(vectors, signs, tokens)).sum(axis=1)
        assert number == same[away.argmin()]
        np.testing.assert_allclose(distance, distance_of(vectors, tokens, records[number]), rtol=1e-5)
    assert (numbers[-3], distances[-3]) == (7, 0)
    assert np.isfinite(distances).sum() > 15 < np.isinf(distances).sum()


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_only_the_same_tokens_have_no_distance(isa, world):
    vectors, signs, _ = world
    vectors = vectors.copy()
    vectors[1] = vectors[0]
    one = np.zeros((2, 16), "int32")
    other, turned = one.copy(), one.copy()
    other[0, 3], turned[1, 3] = 1, 1
    _, (of_other,) = look_up(isa, vectors, signs, [one], [other])
    assert 0 < of_other < 1e-6
    number, (of_turned,) = look_up(isa, vectors, signs, [one], [turned])
    assert number == 0 and of_turned == np.inf
    numbers, distances = look_up(isa, vectors, signs, [one, turned], [turned, one])
    assert (numbers == [1, 0]).all() and (distances == 0).all()


def test_every_instruction_set_finds_the_same_bits_alone_and_among_others(world):
    first, *others = oracles.several()
    vectors, signs, requests = world
    wanted = look_up(first, vectors, signs, requests[:50], requests)
    for isa in others:
        for got, expected in zip(look_up(isa, vectors, signs, requests[:50], requests), wanted, strict=True):
            np.testing.assert_array_equal(got, expected)
    for i in (0, 60, 70):
        number, distance = look_up(first, vectors, signs, requests[:50], requests[i : i + 1])
        assert number == wanted[0][i] and distance == wanted[1][i]
