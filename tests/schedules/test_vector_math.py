"""Every vector function against the exact one, densely over its range; both vector widths give the same bits."""

from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tvm
from scipy import special
from tvm.script import tirx as T

from whet.passes.dialect import Activation
from whet.schedules import isa, vector_math

TARGETS = {16: {"kind": "llvm", "mcpu": "skylake-avx512"}, 8: {"kind": "llvm", "mcpu": "haswell"}}
FLAGS = set(Path("/proc/cpuinfo").read_text().split())


def evaluate(function, values, lanes):
    @T.prim_func(s_tir=True)
    def kernel(xh: T.handle, yh: T.handle):
        n = T.int64()
        x = T.match_buffer(xh, (n, lanes), "float32")
        y = T.match_buffer(yh, (n, lanes), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.serial(n):
                y[i, T.ramp(0, 1, lanes)] = function(x[i, T.ramp(0, 1, lanes)], lanes)

    built = tvm.compile(kernel, target=TARGETS[lanes])
    assert "expf" not in built.mod.inspect_source("asm")
    assert "tanhf" not in built.mod.inspect_source("asm")
    padded = np.zeros(-(-values.size // 16) * 16, "float32")
    padded[: values.size] = values
    x = tvm.runtime.tensor(padded.reshape(-1, lanes))
    y = tvm.runtime.tensor(np.zeros_like(padded).reshape(-1, lanes))
    built(x, y)
    return y.numpy().reshape(-1)[: values.size]


def on_both_widths(function, values):
    if "avx512dq" not in FLAGS:
        pytest.skip("no AVX-512 here to compare with")
    wide, narrow = evaluate(function, values, 16), evaluate(function, values, 8)
    ordinary = np.maximum(np.abs(wide), np.abs(narrow)) > 1e-35  # what is smaller may vanish in one of them
    np.testing.assert_array_equal(wide[ordinary], narrow[ordinary])
    return wide


def dense_range(low, high, count=200_001):
    return np.linspace(low, high, count).astype("float32")


@pytest.mark.parametrize(("degree", "tolerance"), [(3, 1.1e-4), (4, 3.1e-6), (5, 3e-7)])
def test_exp2(degree, tolerance):
    t = np.concatenate([dense_range(-125, 126), np.arange(-100, 100, dtype="float32")])
    got = on_both_widths(lambda t, lanes: vector_math.exp2(t, lanes, degree), t)
    np.testing.assert_allclose(got, np.exp2(t.astype("float64")), rtol=tolerance)
    assert got[t == 0] == 1


def test_exp():
    x = dense_range(-20, 20)
    np.testing.assert_allclose(on_both_widths(vector_math.exp, x), np.exp(x.astype("float64")), rtol=6e-7)
    x = dense_range(-86, 88)
    np.testing.assert_allclose(on_both_widths(vector_math.exp, x), np.exp(x.astype("float64")), rtol=1.5e-6)


def test_exp_underflows_to_nothing():
    x = np.array([-130, -1000, -1e4, -1e30, -3e38], "float32")
    for lanes in TARGETS:
        if lanes == 16 and "avx512dq" not in FLAGS:
            continue
        for function in (vector_math.exp, vector_math.exp2):
            got = evaluate(function, x, lanes)
            np.testing.assert_allclose(got, np.zeros_like(x), atol=1e-38)


@pytest.mark.parametrize(("degree", "tolerance"), [(3, 1.1e-4), (5, 3e-7)])
def test_exp2_of_products(degree, tolerance):
    scale = np.float32(0.0123)

    def function(x, lanes):
        x, y = T.Bind(x), T.Bind(isa.splat(float(scale), lanes))
        return vector_math.exp2_of_products([x], y, 255.0, lanes, degree)[0]

    x = dense_range(-120 / scale, 0)
    got = on_both_widths(function, x)
    np.testing.assert_allclose(got, 255 * np.exp2(np.float64(scale) * x), rtol=tolerance)
    assert got[-1] == 255
    assert (on_both_widths(function, np.array([-2e4, -1e6, -8e7], "float32")) < 1e-30).all()


def gelu(x):
    return x * special.ndtr(x)


def gelu_tanh(x):
    return x * special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize(
    ("function", "exact", "tolerance"),
    [
        (vector_math.gelu, gelu, 1e-6),
        (vector_math.gelu_tanh, gelu_tanh, 1e-6),
        (vector_math.rough_gelu, gelu, 1.5e-4),
        (partial(vector_math.rough_gelu, kind="tanh"), gelu_tanh, 1.5e-4),
        (vector_math.tanh, np.tanh, 3e-7),
        (vector_math.relu, lambda x: np.maximum(x, 0), 0),
    ],
)
def test_activations(function, exact, tolerance):
    far = 2.0 ** np.arange(3, 60)
    for x in (dense_range(-10, 10), np.concatenate([-far, far]).astype("float32")):
        np.testing.assert_allclose(on_both_widths(function, x), exact(x.astype("float64")), rtol=1.2e-7, atol=tolerance)
    assert on_both_widths(function, np.zeros(1, "float32"))[0] == 0


def test_rsqrt():
    x = np.concatenate([dense_range(1e-12, 4), 2.0 ** np.arange(-60, 60)]).astype("float32")
    np.testing.assert_allclose(on_both_widths(vector_math.rsqrt, x), x.astype("float64") ** -0.5, rtol=1.3e-7)


def test_every_activation_of_the_dialect_is_there():
    assert set(vector_math.ACTIVATIONS) == set(get_args(Activation))
