"""Whether requests have changed: soon seen where many do, hardly ever where none does."""

import numpy as np
import pytest

from whet.runtime.change import ChangeDetector

SHARES = (0.9, 0.0, 0.08, 0.02)


def places(rng, count, foreign=0.0):
    """Where requests leave, of which a share runs to the end whatever it did before."""
    return np.where(rng.random(count) < foreign, 3, rng.choice(4, count, p=SHARES)).tolist()


@pytest.mark.parametrize(("foreign", "within"), [(0.5, 25), (0.25, 60), (0.1, 400)])
def test_a_change_shows(foreign, within):
    rng = np.random.default_rng(0)
    late = [not ChangeDetector(SHARES).saw(places(rng, within, foreign)) for _ in range(50)]
    assert np.mean(late) <= 0.1


def test_nothing_shows_where_nothing_changed():
    rng = np.random.default_rng(1)
    detector = ChangeDetector(SHARES)
    assert sum(detector.saw(places(rng, 1000)) for _ in range(200)) <= 3
    assert not detector.saw([0, 1, 2, 3])  # a place where nobody left is no proof


def test_it_starts_anew_and_can_be_told_what_to_expect():
    detector = ChangeDetector(SHARES)
    assert detector.saw([3] * 10)
    assert not detector.saw([3])
    detector.expect((0.0, 0.0, 0.0, 1.0))
    assert not detector.saw([3] * 10_000)
