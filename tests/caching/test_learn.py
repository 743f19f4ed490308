"""The predictor learns what can be learned, whatever the scale of the features."""

import numpy as np

from whet.caching.learn import fit_predictor, softmax


def test_it_finds_the_classes_and_their_probabilities():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (4, 12)).astype("float32")
    x = rng.normal(0, 1, (3000, 12)).astype("float32")
    probabilities = softmax(x @ truth.T)
    scale, shift = np.geomspace(0.01, 100, 12).astype("float32"), np.arange(12, dtype="float32")
    weight, bias = fit_predictor(x * scale + shift, probabilities)
    assert weight.dtype == bias.dtype == np.float32
    fresh = rng.normal(0, 1, (500, 12)).astype("float32")
    found = softmax((fresh * scale + shift) @ weight.T + bias)
    np.testing.assert_allclose(found, softmax(fresh @ truth.T), atol=0.03)


def test_the_same_seed_gives_the_same_bits():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, (300, 5)).astype("float32"), softmax(rng.normal(0, 1, (300, 3)).astype("float32"))
    first, second = (fit_predictor(x, y, steps=6, seed=7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
