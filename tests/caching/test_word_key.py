"""What is learned of pairs of records: distances like those of their attention."""

import ctypes

import numpy as np
import pytest

from whet.caching.word_key import Pairs, fit_vectors, pairs_of, variation
from whet.runtime.memo_file import Description, MemoFile, create
from whet.runtime.metadata import Records

WORDS, CHANNELS = 60, 12
RECORDS = Records("0" * 64, 2, 3, CHANNELS)
COUNTED = np.arange(CHANNELS) < 3
"""Channels of a word's embedding that decide where requests look."""


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(0, 1, (WORDS, CHANNELS)).astype(np.float32)


def probabilities(table, ids):
    """Of all layers and heads: each query looks at keys by the counted channels of their words."""
    rng = np.random.default_rng(1)
    look = rng.normal(0, 0.7, (RECORDS.layers, RECORDS.heads, len(ids), COUNTED.sum()))
    scores = look @ table[ids][:, COUNTED].T
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def record(p):
    """As kernels write it: 255 for the highest of each query; what lies beyond the request is anything."""
    *of, n, _ = p.shape
    tiles, quads = -(-n // 16), -(-n // 4)
    laid = np.full((*of, tiles * 16, quads * 4), 77, np.uint8)
    laid[..., :n, :n] = np.round(255 * p / p.max(axis=-1, keepdims=True))
    return laid.reshape(*of, tiles, 16, quads, 4).transpose(0, 1, 2, 4, 3, 5).reshape(-1)


@pytest.fixture(scope="module")
def file(table, tmp_path_factory):
    """Records of 18 and 20 tokens that resemble one another, and one of another length."""
    path = tmp_path_factory.mktemp("memo") / "a.memo"
    levels = {"default": 1.0}
    description = Description("m", RECORDS, WORDS, 200, 4 << 20, levels, {"default": "words"}, {}, {})
    create(path, description, np.stack([table, table]))
    file = MemoFile(path, writable=True)
    rng = np.random.default_rng(2)
    signs = rng.choice([-1, 1], (20, CHANNELS))
    templates = {n: rng.integers(0, WORDS, n) for n in (18, 20)}
    for n in [18, 20] * 60 + [5]:
        ids = templates.get(n, np.arange(5)).copy()
        places = rng.integers(0, n, rng.integers(1, 6))
        ids[places] = rng.integers(0, WORDS, len(places))
        tokens = np.stack([ids, np.zeros_like(ids)]).astype(np.int32)
        laid = record(probabilities(table, ids))
        np.ctypeslib.as_array((ctypes.c_uint8 * len(laid)).from_address(file.room(n)))[:] = laid
        file.add(tokens, np.stack([(table[ids] * signs[: len(ids)]).sum(axis=0) * len(ids) ** -0.5] * 2))
    return file


def test_the_distance_of_records_is_the_total_variation_of_their_probabilities(file, table):
    for a, b in ((0, 2), (1, 3)):
        p, q = (probabilities(table, file.tokens(i)[0]) for i in (a, b))
        assert variation(file, a, b) == pytest.approx(np.abs(p - q).sum(axis=-1).mean() / 2, abs=5e-3)
        assert variation(file, a, a) == 0


def distances(vectors, pairs):
    squares = np.square(vectors[pairs.ids[0]] - vectors[pairs.ids[1]]).sum(axis=1)
    return np.sqrt(pairs.scale * np.add.reduceat(squares, pairs.starts[:-1]))


def test_learned_distances_are_those_of_attention_where_words_are_not(file, table):
    pairs, others = pairs_of(file), pairs_of(file, seed=1)
    assert pairs.starts[-1] == pairs.ids.shape[1] and len(pairs.variation) > 10_000
    learned = distances(fit_vectors(table, pairs, 8), others)
    assert np.abs(learned - others.variation).mean() < 0.2 * others.variation.mean()
    by_words = np.corrcoef(distances(table, others), others.variation)[0, 1]
    assert np.corrcoef(learned, others.variation)[0, 1] > max(0.95, by_words + 0.03)


def test_files_whose_records_have_no_other_of_their_length_give_no_pairs(table, tmp_path):
    description = Description("m", RECORDS, WORDS, 9, 1 << 20, {}, {}, {}, {})
    create(tmp_path / "a.memo", description, np.stack([table, table]))
    file = MemoFile(tmp_path / "a.memo", writable=True)
    assert isinstance(pairs_of(file), Pairs) and not len(pairs_of(file).scale)
    for n in (3, 4):
        file.add(np.zeros((2, n), np.int32), np.zeros((2, CHANNELS), np.float32))
    assert not len(pairs_of(file).scale)
