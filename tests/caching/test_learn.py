"""The predictor learns what can be learned, whatever the scale of the features."""

import numpy as np

from whet.caching.cache import look_up
from whet.caching.learn import fit_classifier, softmax


def test_it_finds_the_classes_and_their_probabilities():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (4, 12)).astype("float32")
    x = rng.normal(0, 1, (3000, 12)).astype("float32")
    probabilities = softmax(x @ truth.T)
    scale, shift = np.geomspace(0.01, 100, 12).astype("float32"), np.arange(12, dtype="float32")
    arrays = fit_classifier(x * scale + shift, probabilities)
    fresh = rng.normal(0, 1, (500, 12)).astype("float32")
    answers, trust = look_up(fresh * scale + shift, *arrays, kind="classifier")
    np.testing.assert_allclose(softmax(answers), softmax(fresh @ truth.T), atol=0.03)
    np.testing.assert_allclose(trust, softmax(answers).max(1), rtol=1e-5)


def test_the_same_seed_gives_the_same_bits():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, (300, 5)).astype("float32"), softmax(rng.normal(0, 1, (300, 3)).astype("float32"))
    first, second = (fit_classifier(x, y, steps=6, seed=7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
