"""From scores to words and answers."""

import itertools

import numpy as np
import pytest

from whet.runtime.spans import best_answers, merge_windows, sigmoid, softmax, words


def test_softmax_and_sigmoid_do_not_overflow():
    x = np.array([[1000.0, 0.0, -1000.0], [3.0, 3.0, 3.0]], np.float32)
    np.testing.assert_allclose(softmax(x), [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_allclose(
        sigmoid(np.array([-1000.0, 0.0, 2.0, 1000.0])), [0, 0.5, 1 / (1 + np.exp(-2)), 1], rtol=1e-6
    )
    assert softmax(x).dtype == sigmoid(x).dtype == np.float32


def test_words():
    spans = [(s.start, s.stop) for s in words([0, 0, 1, None, None, 2, 2, 2])]
    assert spans == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 8)]
    assert words([]) == []


def test_merge_takes_the_window_with_most_context():
    first = np.full((6, 1), 1, np.float32)  # tokens 0 to 5
    second = np.full((6, 1), 2, np.float32)  # tokens 3 to 8
    merged = merge_windows([(0, first), (3, second)], 9)[:, 0]
    np.testing.assert_array_equal(merged, [1, 1, 1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize(("tokens", "room", "overlap"), [(30, 10, 4), (10, 10, 4), (11, 10, 5), (25, 10, 0)])
def test_merge_covers_every_token(tokens, room, overlap):
    truth = np.arange(tokens, dtype=np.float32)[:, None]
    starts = range(0, max(1, tokens - overlap), room - overlap)
    windows = [(s, truth[s : s + room]) for s in starts]
    np.testing.assert_array_equal(merge_windows(windows, tokens), truth)


@pytest.mark.parametrize("seed", range(5))
def test_best_answers_against_all_pairs(seed):
    rng = np.random.default_rng(seed)
    start, end = rng.standard_normal((2, 12)).astype(np.float32) * 3
    context = slice(4, 11)
    probabilities = []
    for logits in (start, end):
        e = np.exp(logits[[*range(4, 11), 0]])
        probabilities.append(e / e.sum())
    pairs = [
        (4 + s, 4 + e, probabilities[0][s] * probabilities[1][e])
        for s, e in itertools.product(range(7), repeat=2)
        if s <= e < s + 3
    ]
    pairs.sort(key=lambda pair: -pair[2])
    found = list(best_answers(start, end, context, max_length=3))
    assert len(found) == len(pairs)
    assert [f[:2] for f in found] == [p[:2] for p in pairs]
    np.testing.assert_allclose([f[2] for f in found], [p[2] for p in pairs], rtol=1e-5)


def test_best_answers_when_there_are_few():
    logits = np.zeros(5, np.float32)
    assert list(best_answers(logits, logits, slice(0, 0), 30)) == []
    assert len(list(best_answers(logits, logits, slice(2, 4), 30))) == 3


def test_an_unanswerable_window_scores_low():
    logits = np.zeros(6, np.float32)
    answerable = next(best_answers(logits, logits, slice(2, 5), 30))[2]
    logits[0] = 10
    assert next(best_answers(logits, logits, slice(2, 5), 30))[2] < answerable / 100
