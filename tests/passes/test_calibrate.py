import numpy as np
import pytest
from graphs import build, requests

from whet.passes.calibrate import Observation, affine_u8, observe, symmetric_s8


def seen(values) -> Observation:
    observation = Observation(seed=0)
    observation.add(np.asarray(values, np.float32))
    return observation


def test_observe_sees_every_token_and_splits_parts():
    module = build(lambda b: b.dense(b.embed(8), 12, "wide"))
    got = observe(module, {"embeddings": 1, "wide": 3}, requests(5, 9))
    assert [len(got[n]) for n in ("embeddings", "wide")] == [1, 3]
    assert got["embeddings"][0].sample.size == (5 + 9) * 8
    assert got["wide"][1].sample.size == (5 + 9) * 4


def test_minmax_covers_the_range_and_zero():
    scale, zero = affine_u8(seen([1.0, 3.0]), "minmax", 0)
    assert (scale, zero) == (pytest.approx(3 / 255), 0)
    scale, zero = affine_u8(seen([-1.0, 3.0]), "minmax", 0)
    assert zero == round(255 / 4)
    assert symmetric_s8(seen([-2.0, 1.0]), "minmax", 0) == pytest.approx(2 / 127)


def test_mse_clips_a_lone_outlier_only_if_that_is_better():
    values = np.random.default_rng(0).normal(size=20000)
    clipped, _ = affine_u8(seen(np.append(values, 8.0)), "mse", 0)
    assert clipped < affine_u8(seen(np.append(values, 8.0)), "minmax", 0)[0]
    uniform = np.linspace(-1, 1, 1001)
    assert affine_u8(seen(uniform), "mse", 0)[0] == pytest.approx(2 / 255, rel=0.03)


def test_percentile_cuts_the_tails():
    values = np.append(np.linspace(-1, 1, 10001), 100.0)
    scale, _ = affine_u8(seen(values), "percentile", 99.0)
    assert scale == pytest.approx(2 / 255, rel=0.05)


def test_all_zero_activations_get_a_usable_scale():
    scale, zero = affine_u8(seen(np.zeros(10)), "mse", 0)
    assert scale > 0 and zero == 0


def test_infinite_activations_are_an_error():
    with pytest.raises(ValueError, match="finite"):
        affine_u8(seen([np.inf, 1.0]), "minmax", 0)
