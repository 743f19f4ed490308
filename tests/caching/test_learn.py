"""The predictor learns what can be learned, whatever the scale of the features."""

import numpy as np

from whet.caching.cache import look_up
from whet.caching.learn import fit_perceptron, softmax


def test_it_finds_the_classes_and_their_probabilities():
    rng = np.random.default_rng(0)
    truth, spread = (rng.normal(0, 1, shape).astype("float32") for shape in ((4, 12), (12, 96)))
    scale, shift = np.geomspace(0.01, 100, 96).astype("float32"), np.arange(96, dtype="float32")
    x, fresh = (rng.normal(0, 1, (n, 12)).astype("float32") for n in (3000, 500))
    arrays = fit_perceptron(x @ spread * scale + shift, softmax(x @ truth.T))
    answers, trust = look_up(fresh @ spread * scale + shift, *arrays, kind="perceptron")
    wanted = softmax(fresh @ truth.T)
    assert np.abs(softmax(answers) - wanted).mean() < 0.05  # dropout keeps them a little less sure
    assert (answers.argmax(1) == wanted.argmax(1))[wanted.max(1) > 0.6].mean() > 0.98
    *_, second, largest = np.sort(softmax(answers), axis=1).T
    np.testing.assert_allclose(trust, largest - second, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, (300, 5)).astype("float32"), softmax(rng.normal(0, 1, (300, 3)).astype("float32"))
    first, second = (fit_perceptron(x, y, steps=6, seed=7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
