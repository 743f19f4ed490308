"""What answers lose, by the kind of model."""

from types import SimpleNamespace

import numpy as np
import pytest

from whet.answer_loss import losses


def of(task, channels, plain, other):
    metadata = SimpleNamespace(task=task, output=SimpleNamespace(channels=channels))
    return losses(metadata, *([np.array(rows, np.float32) for rows in x] for x in (plain, other)))


def logits(*probabilities):
    return np.log(np.array(probabilities, np.float32))


def test_classes_lose_their_probability_or_all_if_another_is_likeliest():
    plain = [logits([0.7, 0.2, 0.1])] * 3
    other = [plain[0], logits([0.6, 0.2, 0.2]), logits([0.4, 0.5, 0.1])]
    np.testing.assert_allclose(of("sequence_classification", 3, plain, other), [0, 0.1, 1], atol=1e-6)


def test_tags_lose_on_average_of_the_tokens():
    plain, other = logits([0.7, 0.3], [0.2, 0.8]), logits([0.6, 0.4], [0.6, 0.4])
    assert of("token_classification", 2, [plain], [other]) == pytest.approx([(0.1 + 1) / 2], abs=1e-6)


def test_both_ends_of_an_answer_are_classes_of_the_tokens():
    plain = np.stack([logits([0.5, 0.3, 0.2])[0], logits([0.1, 0.1, 0.8])[0]], axis=1)
    other = np.stack([logits([0.4, 0.3, 0.3])[0], logits([0.5, 0.1, 0.4])[0]], axis=1)
    assert of("question_answering", 2, [plain], [other]) == pytest.approx([(0.1 + 1) / 2], abs=1e-6)


def test_scores_lose_by_how_much_all_of_them_differ():
    plain, other = [[[-2.0]], [[2.0]]], [[[-2.0]], [[1.0]]]
    np.testing.assert_allclose(of("sequence_classification", 1, plain, other), [0, 1 / 2 / 4])


def test_embeddings_lose_their_direction_and_the_same_bits_nothing():
    a = np.array([[1.0, 2.0], [0.3, 0.1]])
    found = of("embedding", 2, [a[:1], a[1:], a], [a[:1], [[-0.1, 0.3]], [a[0], [-0.1, 0.3]]])
    np.testing.assert_allclose(found, [0, 1, 0.5], atol=1e-6)
    assert found[0] == 0
