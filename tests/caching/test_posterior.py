"""The probabilities that losses are estimated by: true on average, and surer than one expert alone."""

import numpy as np
import pytest

from whet.caching.learn import softmax
from whet.caching.posterior import fit_posterior, fit_weights


def world(requests=4000, classes=5, seed=0):
    """Two experts that see the truth through noise of their own, the second too sure by a factor of 3, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=requests)
    seen = [np.eye(classes)[labels] + rng.normal(0, 0.7, (requests, classes)) for _ in range(2)]
    return [seen[0] / 0.49, 3 * seen[1] / 0.49], labels


def test_probabilities_are_calibrated_and_better_than_those_of_each_expert():
    experts, labels = world()
    found = fit_posterior(experts, labels)
    rows = np.arange(len(labels))

    def entropy(probabilities):
        return -np.log(probabilities[rows, labels]).mean()

    # With Gaussian noise the posterior is known: the sum of the experts, each by its own precision.
    assert abs(entropy(found) - entropy(softmax(experts[0] + experts[1] / 3))) < 2e-3
    assert entropy(found) < min(entropy(softmax(expert)) for expert in experts) - 0.05
    sure = found.max(axis=1)
    right = found.argmax(axis=1) == labels
    for low, high in ((0.3, 0.6), (0.6, 0.9), (0.9, 1.0)):
        some = (sure >= low) & (sure < high)
        assert abs(sure[some].mean() - right[some].mean()) < 0.04


def test_one_expert_is_brought_to_its_temperature():
    experts, labels = world()
    assert fit_weights(experts[:1], labels) == pytest.approx([1], abs=0.05)
    assert fit_weights(experts[1:], labels) == pytest.approx([1 / 3], abs=0.02)


def test_the_mean_of_losses_is_that_of_labels_with_less_noise():
    experts, labels = world()
    found = fit_posterior(experts, labels)
    first, second = (expert.argmax(axis=1) for expert in experts)
    rows = np.arange(len(labels))
    by_labels = (first == labels).astype(float) - (second == labels)
    by_posterior = found[rows, first] - found[rows, second]
    error = by_labels.std() / np.sqrt(len(labels))
    assert abs(by_labels.mean() - by_posterior.mean()) < 3 * error
    assert by_posterior.std() < 0.8 * by_labels.std()


def test_labels_that_are_all_told_give_finite_weights():
    logits = 50 * np.eye(3)[np.arange(300) % 3]
    found = fit_posterior([logits, logits], np.arange(300) % 3)
    assert np.isfinite(found).all() and (found.max(axis=1) > 0.99).all()
