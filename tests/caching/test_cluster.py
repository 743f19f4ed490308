"""Clusters stand for one answer each, and are trusted near their middle only."""

import numpy as np

from whet.caching.cache import look_up
from whet.caching.cluster import fit_clusters, kmeans
from whet.caching.learn import softmax


def blobs(labels=5, blobs_each=3, members=40, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 4, (labels * blobs_each, 16))
    which = np.repeat(np.arange(len(centres)), members)
    return (centres[which] + rng.normal(0, 0.5, (len(which), 16))).astype("float32"), which // blobs_each


def test_kmeans_finds_blobs():
    points, _ = blobs(labels=4, blobs_each=1)
    centroids = kmeans(points, 4, np.random.default_rng(0))
    means = points.reshape(4, 40, 16).mean(axis=1)
    np.testing.assert_allclose(np.sort(centroids, axis=0), np.sort(means, axis=0), atol=1e-5)
    assert len(kmeans(points[:3], 8, np.random.default_rng(0))) == 3
    assert len(kmeans(np.repeat(points[:1], 9, axis=0), 8, np.random.default_rng(0))) == 1


def test_answers_and_trust():
    points, labels = blobs()
    logs = np.log(np.full((len(labels), 5), 0.02) + 0.9 * np.eye(5)[labels]).astype("float32")
    arrays = fit_clusters(points, logs, labels)
    answers, trust = look_up(points, *arrays, kind="clusters")
    assert (answers.argmax(axis=1) == labels).all()
    np.testing.assert_allclose(softmax(answers).max(axis=1), 0.92, atol=0.05)
    assert 0.4 < (trust >= 0).mean() < 0.7  # half of each cluster's members are within its reach
    far = look_up(points + 20, *arrays, kind="clusters")[1]
    assert far.max() < trust.min()


def test_a_cluster_does_not_reach_to_requests_of_another_answer():
    points, labels = blobs()
    labels[7] = 4  # of the first blob, whose other members are of group 0
    logs = np.log(np.full((len(labels), 5), 0.02) + 0.9 * np.eye(5)[labels]).astype("float32")
    arrays = fit_clusters(points, logs, labels)
    answers, trust = look_up(points, *arrays, kind="clusters")
    wrong = answers.argmax(axis=1) != labels
    assert trust[wrong].max(initial=-1) <= 1e-3


def test_the_same_seed_gives_the_same_bits():
    points, labels = blobs(members=9)
    first, second = (fit_clusters(points, points[:, :3], labels, seed=3) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
