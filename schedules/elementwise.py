"""Element-wise kernels on tiles: activation, sum, and rounding to what dense layers multiply, quads or pairs.

The rounding is also the tail of other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, quantize4, round_bf16, splat, view
from whet.schedules.vector_math import ACTIVATIONS

QUAD = 4
"""Channels in a quad."""

Quantization: TypeAlias = Literal["none", "bf16", "static", "per_token"]
"""What a kernel writes beside tiles: nothing; pairs; quads with the scale and zero point in requant; quads with some of
each token's own."""

_SMALLEST_RANGE = 1e-30
"""What a token whose channels are all zero is quantised with."""


@dataclass(frozen=True)
class ActivateSpec:
    """Activation ``kind`` (see whet.passes.dialect) of tiles: arguments x, out ``(nt, C, 16)`` float32."""

    channels: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class AddSpec:
    """Sum of two tiles: arguments x, y, out ``(nt, C, 16)`` float32."""

    channels: int


@dataclass(frozen=True)
class QuantizeSpec:
    """Tiles to pairs or quads.

    bf16: arguments x ``(nt, C, 16)`` float32, pairs ``(nt, C/2, 16, 2)``, bits of bfloat16 as uint16. Static: arguments
    x, requant ``(C + 1,)`` float32 (1/s of each channel, then the zero point of all), quads ``(nt, C/4, 16, 4)`` uint8.
    Per token: x, quads,
    token_params ``(nt, 2, 16)`` float32 (s and s × zero point of each token).
    """

    channels: int
    mode: Quantization = "static"

    def __post_init__(self) -> None:
        if self.mode == "none":
            raise ValueError("mode is 'none'; expected 'bf16', 'static' or 'per_token'")
        check_quads(self.channels)


def check_quads(channels: int) -> None:
    """Raise ValueError unless the channels fill quads (or two pairs)."""
    if channels % QUAD:
        raise ValueError(f"channels is {channels}; quads and pairs need a multiple of {QUAD}, so pad the channels")


def lanes_of(part: Any, isa: Isa) -> Any:
    """Index of the lanes of one vector of a tile."""
    return T.ramp(part * isa.lanes, 1, isa.lanes)


def declare_quads(quantization: Quantization, tiles: Any, channels: int) -> tuple[Any, Any]:
    """Declare the outputs quads, or pairs, and token_params; None where there are none."""
    if quantization == "none":
        return None, None
    if quantization == "bf16":
        return parameter("pairs", (tiles, channels // 2, TILE, 2), "uint16"), None
    quads = parameter("quads", (tiles, channels // QUAD, TILE, QUAD), "uint8")
    params = parameter("token_params", (tiles, 2, TILE), "float32") if quantization == "per_token" else None
    return quads, params


def words(quads: Any) -> Any:
    """Show quads as int32 ``(nt, C/4, 16)``: the four channels of a token are one value; pairs likewise."""
    return named("words", view(quads, quads.shape[:3], "int32"))


def declare_requant(channels: int) -> Any:
    """Declare the parameter requant: 1/s of each channel, then the zero point of all."""
    return parameter("requant", (channels + 1,), "float32")


def quantize_channels(rows: Sequence[Any], first: Any, requant: Any, isa: Isa) -> Any:
    """Four float32 vectors, the channels from ``first`` on, to one int32 vector of quads as ``requant`` says."""
    inverses = [splat(requant[first + i], isa.lanes) for i in range(QUAD)]
    return quantize4(rows, inverses, splat(requant[requant.shape[0] - 1], isa.lanes), isa.lanes)


def quantize_rows(rows: Sequence[Any], inverse: Any, zero: Any, isa: Isa) -> Any:
    """Four float32 vectors, the channels of a quad, to one int32 vector of quads."""
    return quantize4(rows, [inverse] * QUAD, zero, isa.lanes)


def round_all(
    channels: int, row: Callable[[Any], Any], requant: Any, rounded: Any, tile: Any, part: Any, isa: Isa
) -> None:
    """Round ``row(channel)`` of all channels, for one vector of a tile: to quads as ``requant`` says, else to pairs.

    ``rounded`` are the quads or pairs as int32.
    """
    at = lanes_of(part, isa)
    if requant is None:
        with T.serial(channels // 2) as pair:
            T.buffer_store(rounded, round_bf16(row(pair * 2), row(pair * 2 + 1)), [tile, pair, at])
    else:
        with T.serial(channels // QUAD) as quad:
            rows = [row(quad * QUAD + i) for i in range(QUAD)]
            T.buffer_store(rounded, quantize_channels(rows, quad * QUAD, requant, isa), [tile, quad, at])


def token_range(low: Any, high: Any, isa: Isa) -> tuple[Any, Any, Any]:
    """Scale, its reciprocal and the zero point for tokens whose channels lie in [low, high].

    Asymmetric over the range with 0 in it, as ONNX's DynamicQuantizeLinear defines it.
    """
    lanes = isa.lanes
    nothing = splat(0.0, lanes)
    low, high = T.Bind(T.min(low, nothing)), T.Bind(T.max(high, nothing))
    scale = T.Bind(T.max(high - low, splat(_SMALLEST_RANGE, lanes)) / splat(255.0, lanes))
    inverse = T.Bind(splat(1.0, lanes) / scale)
    zero = T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.nearbyint", -(low * inverse))
    return scale, inverse, T.Bind(T.min(zero, splat(255.0, lanes)))


def widen(low: Any, high: Any, rows: Sequence[Any]) -> None:
    """Let the registers ``low`` and ``high`` hold the extremes of ``rows``, a quad of vectors, too.

    The four are compared first, so that the registers, each waiting for its last value, change once in a quad.
    """
    for register, extreme in ((low, T.min), (high, T.max)):
        a, b, c, d = rows
        T.buffer_store(register, extreme(register[0], extreme(extreme(a, b), extreme(c, d))), [0])


def quantize_tokens(
    x: Any, low: Any, high: Any, *, quads: Any, token_params: Any, tile: Any, part: Any, isa: Isa
) -> None:
    """Quantise the tokens of one vector of a tile, whose channels lie in [low, high], each with its own range."""
    at = lanes_of(part, isa)
    scale, inverse, zero = token_range(low, high, isa)
    T.buffer_store(token_params, scale, [tile, 0, at])
    T.buffer_store(token_params, scale * zero, [tile, 1, at])
    with T.serial(x.shape[1] // QUAD) as quad:
        rows = [x[tile, quad * QUAD + i, at] for i in range(QUAD)]
        T.buffer_store(quads, quantize_rows(rows, inverse, zero, isa), [tile, quad, at])


def elementwise(spec: ActivateSpec | AddSpec | QuantizeSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel of an element-wise operation; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(type(spec).__name__.removesuffix("Spec").lower())
            tiles = named("tiles", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            if isinstance(spec, QuantizeSpec):
                _quantize(spec, isa, x, tiles)
            else:
                _map(spec, isa, x, tiles)
        return builder.get()


def _map(spec: ActivateSpec | AddSpec, isa: Isa, x: Any, tiles: Any) -> None:
    y: Any = parameter("y", x.shape, "float32") if isinstance(spec, AddSpec) else None
    out = parameter("out", x.shape, "float32")
    with T.sblock("root"):
        T.reads()
        T.writes()
        with T.parallel(tiles) as tile, T.serial(spec.channels) as c, T.serial(isa.parts) as part:
            at = [tile, c, lanes_of(part, isa)]
            value = ACTIVATIONS[spec.kind](x[at], isa.lanes) if isinstance(spec, ActivateSpec) else x[at] + y[at]
            T.buffer_store(out, value, at)


def _quantize(spec: QuantizeSpec, isa: Isa, x: Any, tiles: Any) -> None:
    requant = declare_requant(spec.channels) if spec.mode == "static" else None
    quads, token_params = declare_quads(spec.mode, tiles, spec.channels)
    lanes = isa.lanes
    with T.sblock("root"):
        T.reads()
        T.writes()
        quads = words(quads)
        with T.parallel(tiles) as tile, T.serial(isa.parts) as part:
            at = lanes_of(part, isa)
            if spec.mode == "per_token":
                low, high = isa.register("float32"), isa.register("float32")
                for register in (low, high):
                    T.buffer_store(register, splat(0.0, lanes), [0])
                with T.serial(spec.channels // QUAD) as quad:
                    widen(low, high, [T.Bind(x[tile, quad * QUAD + i, at]) for i in range(QUAD)])
                quantize_tokens(
                    x, low[0], high[0], quads=quads, token_params=token_params, tile=tile, part=part, isa=isa
                )
            else:
                round_all(spec.channels, lambda c: x[tile, c, at], requant, quads, tile, part, isa)
