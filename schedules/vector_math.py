"""Transcendental functions on float32 vectors, as TIR expressions for the inside of a kernel.

Each function takes and returns an expression of ``lanes`` float32 values: 16 (AVX-512) or 8 (AVX2 with FMA). Both give
the same bits. TVM's own ``T.exp`` on a vector becomes one libm call per lane, hence the polynomials. They are minimax
fits (Lawson's iteration on Chebyshev nodes) of 2ʳ with relative error, and, for GELU, of the base-2
logarithm of the normal tail: Φ(−a) = 2^Q(a), with the error weighted as GELU weights it.

Arguments are finite. An expression used twice is bound with ``let`` so that the code does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from whet.schedules.isa import fma, splat

_LOG2_E = math.log2(math.e)
_ROUNDING = 1.5 * 2.0**23

Vector = Any
"""A TIR expression of type float32x8 or float32x16."""

# 2^r on [-1/2, 1/2], the constant first and exact; relative error 1.0e-4, 2.8e-6 and 9.1e-8.
_EXP2 = {
    3: (1.0, 0.693282927222824, 0.24221095947020788, 0.05500893049241118),
    4: (1.0, 0.6931241934031516, 0.24024098611601835, 0.055906424677943496, 0.009582853038425413),
    5: (1.0, 0.6931469775989931, 0.24022242085262, 0.05550733743496956, 0.009671512644824106, 0.001326472712352439),
}
# log2 Φ(−a); the error of GELU is at most 5.4e-7 for any a, because the last coefficient is negative.
_ERF_TAIL = (-1.0, -1.1510005429, -0.4595958431, -0.0521466329, 0.0071987188, -0.00048810217)
# log2 σ(−2·√(2/π)·(a + 0.044715·a³)); the error of GELU is at most 4.9e-7 on [0, 6].
_TANH_TAIL = (
    -1.0,
    -1.1513160089,
    -0.4578877791,
    -0.0543504053,
    0.0102395567,
    -0.0007101845,
    -0.0007278429,
    0.000104345,
)
_TANH_TAIL_END = 6.0
# The same tails themselves, Φ(−a) and σ(…), where a ≥ end counts as end: the error of GELU is at most 1.4e-4.
_ROUGH_TAIL = {
    "erf": (3.85, (0.49874112, -0.38241121, -0.056795210, 0.15087382, -0.061905105, 0.010775099, -0.00070866087)),
    "tanh": (3.8, (0.49863473, -0.38261691, -0.055256668, 0.14932562, -0.061326735, 0.010686995, -0.00070441951)),
}


def let(value: Any, body: Callable[[Any], Any]) -> Any:
    """``body(v)`` where ``v`` names ``value``: it is computed once however often ``body`` uses it."""
    name = tirx.Var("v", value.ty.dtype)
    return tirx.Let(name, value, body(name))


def polynomial(x: Vector, coefficients: tuple[float, ...], lanes: int) -> Vector:
    """Horner's rule; ``coefficients`` start with the constant."""

    def horner(x: Vector) -> Vector:
        y = splat(coefficients[-1], lanes)
        for c in reversed(coefficients[:-1]):
            y = fma(y, x, splat(c, lanes))
        return y

    return let(x, horner)


def exp2(t: Vector, lanes: int, degree: int = 5) -> Vector:
    """2^t for t ≤ 127, nothing below −127; relative error 1.1e-4, 3e-6, 3e-7 for degree 3, 4, 5."""

    def of_integer(t: Vector, n: Vector) -> Vector:
        return _scale(polynomial(t - n, _EXP2[degree], lanes), n, lanes)

    return let(_representable(t, lanes), lambda t: let(_round(t, lanes), lambda n: of_integer(t, n)))


def exp(x: Vector, lanes: int) -> Vector:
    """e^x for x ≤ 88, nothing below −88; relative error below 6e-7 for |x| ≤ 20, growing to 1.5e-6."""

    def of_integer(x: Vector, n: Vector) -> Vector:
        return _scale(polynomial(fma(x, splat(_LOG2_E, lanes), -n), _EXP2[5], lanes), n, lanes)

    # At −88 the remainder is positive, as _scale needs it.
    bounded = T.max(x, splat(-88.0, lanes))
    return let(bounded, lambda x: let(_round(x * splat(_LOG2_E, lanes), lanes), lambda n: of_integer(x, n)))


def exp2_of_products(xs: Sequence[Vector], y: Vector, factor: float, lanes: int, degree: int = 5) -> list[Vector]:
    """``factor · 2^(x·y)`` of several x, for −10⁶ ≤ x·y ≤ 0 and factor ≥ 1; x·y is not rounded. Errors as for ``exp2``.

    Emits statements, one instruction for each x in turn: a chain takes longer than a CPU looks ahead. ``xs`` and ``y``
    are variables. Adding 1.5·2²³ rounds to an integer in one instruction with the product.
    """
    magic = splat(_ROUNDING, lanes)
    constant, *others = (splat(factor * c, lanes) for c in _EXP2[degree])
    ns = [T.Bind(fma(x, y, magic)) for x in xs]
    ns = [T.Bind(n - magic) for n in ns]
    rs = [T.Bind(fma(x, y, -n)) for x, n in zip(xs, ns, strict=True)]
    ps = [others[-1]] * len(rs)
    for c in [*others[-2::-1], constant]:
        ps = [T.Bind(fma(p, r, c)) for p, r in zip(ps, rs, strict=True)]
    if lanes == 8:
        ns = [T.Bind(T.max(n, splat(-126.0, lanes))) for n in ns]
    return [T.Bind(_scale(p, n, lanes)) for p, n in zip(ps, ns, strict=True)]


def gelu(x: Vector, lanes: int) -> Vector:
    """x·Φ(x), the exact (erf) GELU, within 1e-6 absolute.

    x·Φ(x) = max(x, 0) − |x|·Φ(−|x|): only the tail needs computing, and its logarithm is nearly a parabola.
    """
    return let(x, lambda x: let(_abs(x, lanes), lambda a: _gelu(x, a, polynomial(a, _ERF_TAIL, lanes), lanes)))


def gelu_tanh(x: Vector, lanes: int) -> Vector:
    """Approximate GELU with tanh (``gelu_new``, ``gelu_pytorch_tanh``) within 1e-6 absolute."""

    def of_named(x: Vector) -> Vector:
        bounded = T.min(_abs(x, lanes), splat(_TANH_TAIL_END, lanes))
        return let(bounded, lambda a: _gelu(x, a, polynomial(a, _TANH_TAIL, lanes), lanes))

    return let(x, of_named)


def rough_gelu(x: Vector, lanes: int, kind: str = "erf") -> Vector:
    """``gelu``, or ``gelu_tanh`` for kind "tanh", within 1.5e-4 absolute and in half the instructions.

    For results of 8 bits: a quantisation step is 100 times as large if the layer's outputs reach 4.
    """
    end, tail = _ROUGH_TAIL[kind]

    def of_named(x: Vector) -> Vector:
        return let(_bounded(x, end, lanes), lambda a: fma(-a, polynomial(a, tail, lanes), relu(x, lanes)))

    return let(x, of_named)


def tanh(x: Vector, lanes: int) -> Vector:
    """Hyperbolic tangent within 3e-7 absolute; it divides, so it is for poolers, not for wide layers."""

    def of_magnitude(x: Vector, a: Vector) -> Vector:
        one = splat(1.0, lanes)
        decay = exp2(a * splat(-2.0 * _LOG2_E, lanes), lanes)
        return let(decay, lambda e: _copy_sign((one - e) / (one + e), x, lanes))

    return let(x, lambda x: of_magnitude(x, _abs(x, lanes)))


def relu(x: Vector, lanes: int) -> Vector:
    """max(x, 0)."""
    return T.max(x, splat(0.0, lanes))


def rsqrt(x: Vector, lanes: int) -> Vector:
    """1/√x, correctly rounded twice: every CPU gives the same bits."""
    return splat(1.0, lanes) / T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.sqrt", x)


def identity(x: Vector, lanes: int) -> Vector:
    """Return x: the activation ``none``."""
    return x


ACTIVATIONS: dict[str, Callable[[Vector, int], Vector]] = {
    "none": identity,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "tanh": tanh,
}
"""By the names of whet.passes.dialect.Activation."""


ROUGH_ACTIVATIONS = ACTIVATIONS | {"gelu": rough_gelu, "gelu_tanh": partial(rough_gelu, kind="tanh")}
"""For results that are rounded to 8 bits."""


def _gelu(x: Vector, magnitude: Vector, log2_tail: Vector, lanes: int) -> Vector:
    return fma(-magnitude, exp2(log2_tail, lanes), relu(x, lanes))


def _abs(x: Vector, lanes: int) -> Vector:
    return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.fabs", x)


def _bounded(x: Vector, end: float, lanes: int) -> Vector:
    """``min(|x|, end)``, one instruction on AVX-512."""
    if lanes == 8:
        return T.min(_abs(x, lanes), splat(end, lanes))
    smaller_magnitude = T.int32(0b1010)  # with a sign of 0
    name, nothing = "llvm.x86.avx512.mask.range.ps.512", splat(0.0, 16)
    return T.call_llvm_pure_intrin(
        "float32x16", name, x, splat(end, 16), smaller_magnitude, nothing, T.int16(-1), T.int32(4)
    )


def _copy_sign(magnitude: Vector, sign: Vector, lanes: int) -> Vector:
    return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.copysign", magnitude, sign)


def _round(x: Vector, lanes: int) -> Vector:
    return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.nearbyint", x)


def _representable(t: Vector, lanes: int) -> Vector:
    """Bounds t so that ``_scale`` can shift by it; AVX-512's instruction needs no bounds."""
    return t if lanes == 16 else T.max(t, splat(-127.0, lanes))


def _scale(y: Vector, n: Vector, lanes: int) -> Vector:
    """Scale y by 2^n for an integer n; y · 2^n must not be below 2^-126, or be 2^-127 exactly."""
    if lanes == 16:
        return T.call_llvm_pure_intrin(
            "float32x16", "llvm.x86.avx512.mask.scalef.ps.512", y, n, splat(0.0, 16), T.int16(-1), T.int32(4)
        )
    exponent = T.shift_left(T.Cast(f"int32x{lanes}", n), T.broadcast(T.int32(23), lanes))
    return T.reinterpret(f"float32x{lanes}", T.reinterpret(f"int32x{lanes}", y) + exponent)
