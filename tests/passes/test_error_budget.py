import numpy as np
import pytest

from whet.passes.error_budget import choose_levels, noise

STATIC = ("static", "per_token", "float32")
DYNAMIC = ("per_token", "float32")


def costs(**of_layers):
    """An error that adds up what each layer costs at its level."""

    def error(levels):
        return sum(of_layers[layer].get(level, 0.0) for layer, level in levels.items())

    return error


def test_noise_is_the_error_in_variances():
    reference = np.random.default_rng(0).normal(3, 2, (5000, 4)).astype(np.float32)
    assert noise(reference, reference) == 0
    assert noise(reference + np.float32(0.2), reference) == pytest.approx(0.01, rel=0.05)


def test_nothing_is_raised_within_the_budget():
    error = costs(a={"static": 0.1})
    assert choose_levels({"a": STATIC}, error, 0.1) == ({"a": "static"}, {})


def test_the_worst_layers_go_up_first_and_no_further_than_needed():
    error = costs(
        a={"static": 0.5, "per_token": 0.1},
        b={"per_token": 0.3},
        c={"static": 0.2, "per_token": 0.2},
    )
    seen = []
    levels, raised = choose_levels({"a": STATIC, "b": DYNAMIC, "c": STATIC}, error, 0.35, seen.append)
    assert levels == {"a": "per_token", "b": "float32", "c": "static"}
    assert raised == {"a": 0.5, "b": 0.3}
    assert seen == [1, 2, 3]


def test_a_budget_below_what_float_layers_cost_is_an_error():
    with pytest.raises(ValueError, match=r"max_error is 0\.1.*0\.2"):
        choose_levels({"a": DYNAMIC}, lambda levels: 0.2, 0.1)
