"""Learn the key of a memo: word vectors whose distance says how far apart two requests' attention probabilities are.

A Siamese network as AttMemo trains it (arXiv 2301.09262): of pairs of records, the distance is to be the
total-variation distance of the probabilities. Here it sees the word embedding of each place by itself, so that it
becomes a table of the vocabulary and costs a request no more than word embeddings do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whet.caching.adam import Adam, Floats, dense
from whet.runtime.memo_file import MemoFile

HIDDEN = 128
"""Units of the network's hidden layer."""
NEAR = 8
"""Half of the pairs are of a record and one of the so many nearest by word embeddings, the others of any two."""
_STEPS, _BATCH, _RATE = 1500, 32, 0.003
_PAIRS, _ELEMENTS = 20_000, 2_000_000_000
"""At most so many pairs, and so many probabilities that are compared for them."""
_TILES = 4
"""Tiles of 16 queries that are compared, of long requests; with fewer the distance depends on which they are."""
_PLACES = 48
"""Places of a pair that the network sees, of those that differ."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of requests of the same number of tokens."""

    ids: NDArray[np.int32]
    """Token ids ``(2, places)`` where the requests of a pair differ, one pair after the other."""
    starts: NDArray[np.int64]
    """``(pairs + 1,)``."""
    scale: Floats
    """``(pairs,)``: makes of the sum over places the mean over all of the request's."""
    variation: Floats
    """``(pairs,)``: the distance that they should have."""


def variation(file: MemoFile, a: int, b: int) -> float:
    """Total-variation distance of the probabilities of two records of the same length.

    It is the mean over layers, heads and queries, these a few tiles of long requests.
    """
    first, second = (_probabilities(file, i) for i in (a, b))
    return float(np.abs(first - second).sum(axis=-1).mean() / 2)


def pairs_of(file: MemoFile, seed: int = 0) -> Pairs:
    """Draw pairs of the records of a file, of which ``keys[0]`` tells who is near."""
    rng = np.random.default_rng(seed)
    lengths = file.entries["length"][: file.count].astype(np.int64)
    ids: list[NDArray[np.int32]] = []
    scale, distances = [], []
    for a, b in _drawn(file, lengths, rng):
        one, other = file.tokens(a), file.tokens(b)
        places = np.flatnonzero(one[0] != other[0])
        if len(places) and np.array_equal(one[1], other[1]):
            seen = rng.permutation(places)[:_PLACES]
            ids.append(np.stack([one[0, seen], other[0, seen]]))
            scale.append(len(places) / len(seen) / lengths[a])
            distances.append(variation(file, a, b))
    starts = np.cumsum([0, *(i.shape[1] for i in ids)])
    together = np.concatenate([np.zeros((2, 0), np.int32), *ids], axis=1)
    return Pairs(together, starts, np.array(scale, np.float32), np.array(distances, np.float32))


def fit_vectors(table: Floats, pairs: Pairs, dimensions: int, seed: int = 0) -> Floats:
    """Vectors ``(vocabulary, dimensions)`` of words, of their embeddings ``table`` ``(vocabulary, channels)``.

    The root of the mean over places of the squared distance is fitted to ``pairs.variation``.
    """
    rng = np.random.default_rng(seed)
    x = (table / table.std()).astype(np.float32)
    parameters = [*dense(rng, HIDDEN, x.shape[1]), dense(rng, dimensions, HIDDEN)[0]]
    first, bias, second = parameters
    adam = Adam(parameters, _STEPS, _RATE)
    for _ in range(_STEPS):
        batch = rng.integers(len(pairs.scale), size=_BATCH)
        counts = np.diff(pairs.starts)[batch]
        begin = np.cumsum(counts) - counts
        places = np.repeat(pairs.starts[batch] - begin, counts) + np.arange(counts.sum())
        rows = x[pairs.ids[:, places].reshape(-1)]
        hidden = np.maximum(rows @ first.T + bias, 0)
        one, other = (hidden @ second.T).reshape(2, len(places), -1)
        difference, scale = one - other, pairs.scale[batch]
        squares = np.add.reduceat(np.square(difference).sum(axis=1), begin)
        distance = np.sqrt(scale * squares + 1e-8)
        slope = 2 / _BATCH * (distance - pairs.variation[batch]) / distance * scale
        error = np.repeat(slope, counts)[:, None] * difference
        error = np.concatenate([error, -error])
        back = (error @ second) * (hidden > 0)
        adam.step([back.T @ rows, back.sum(axis=0), error.T @ hidden])
    vectors: Floats = np.maximum(x @ first.T + bias, 0) @ second.T
    vectors -= vectors.mean(axis=0)
    return vectors


def _drawn(file: MemoFile, lengths: NDArray[np.int64], rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Numbers of records, those of common lengths more often."""
    shared, counts = np.unique(lengths, return_counts=True)
    shared, counts = shared[counts > 1], counts[counts > 1]
    if not len(shared):
        return
    of = file.description.records
    share = counts / counts.sum()
    elements = of.layers * of.heads * float((share * shared * np.minimum(shared, 16 * _TILES)).sum())
    most = min(_PAIRS, int(_ELEMENTS / elements))
    for length, number in zip(shared, rng.multinomial(most, share), strict=True):
        records = np.flatnonzero(lengths == length)
        keys = file.keys[0][records]
        norms = np.einsum("nd,nd->n", keys, keys)
        near = min(NEAR, len(records) - 1)
        for i, a in enumerate(rng.integers(len(records), size=number)):
            if i % 2:
                away = norms - 2 * (keys @ keys[a])
                away[a] = np.inf
                b = rng.choice(np.argpartition(away, near - 1)[:near])
            else:
                b = (a + rng.integers(1, len(records))) % len(records)
            yield int(records[a]), int(records[b])


def _probabilities(file: MemoFile, index: int) -> Floats:
    """Of a record, float32 ``(layers, heads, queries, length)``."""
    length = int(file.entries["length"][index])
    records = file.description.records
    tiles = -(-length // 16)
    stored = file.attention(index).reshape(records.layers, records.heads, tiles, -1, 16, 4)
    chosen = np.unique(np.linspace(0, tiles - 1, min(tiles, _TILES)).astype(int))
    queries = (chosen[:, None] * 16 + np.arange(16)).reshape(-1) < length
    rows = stored[:, :, chosen].transpose(0, 1, 2, 4, 3, 5).reshape(records.layers, records.heads, len(queries), -1)
    p: Floats = rows[:, :, queries, :length].astype(np.float32)
    p /= p.sum(axis=-1, keepdims=True)
    return p
