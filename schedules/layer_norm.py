"""Layer norm over the channels of each token.

Tokens are the vector lanes, so the sums run down the channels without a horizontal step. The variance is that of the
differences from the mean (two passes), because a sum of squares loses digits where the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import (
    QUAD,
    Quantization,
    check_quads,
    declare_quads,
    declare_requant,
    lanes_of,
    quantize_tokens,
    round_all,
    widen,
    words,
)
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, fma, splat
from whet.schedules.vector_math import rsqrt

_CHAINS = 8
"""Sums in flight: two additions a cycle with a latency of four."""


@dataclass(frozen=True)
class LayerNormSpec:
    """Layer norm of tiles, optionally rounded in the same pass.

    Arguments: x ``(nt, C, 16)``, gamma and beta ``(C,)``, [requant ``(C + 1,)``], h ``(nt, C, 16)``, all float32,
    [quads ``(nt, C/4, 16, 4)`` uint8, or pairs ``(nt, C/2, 16, 2)``, bits of bfloat16 as uint16], [token_params ``(nt,
    2, 16)`` float32]: requant if ``quantize`` is static, pairs if it is bf16, quads if it is static or per_token,
    token_params if it is per_token. h may be x.
    """

    channels: int
    eps: float
    quantize: Quantization = "none"

    def __post_init__(self) -> None:
        if self.quantize != "none":
            check_quads(self.channels)


@dataclass(frozen=True)
class Norm:
    """The parameters of a layer norm within a kernel, and the code that normalises one tile."""

    spec: LayerNormSpec
    isa: Isa
    gamma: Any
    beta: Any
    requant: Any
    h: Any
    quads: Any
    token_params: Any

    @staticmethod
    def declare(spec: LayerNormSpec, isa: Isa, tiles: Any) -> Norm:
        """Declare gamma, beta, requant, h, quads and token_params (those the specification has)."""
        return Norm(
            spec,
            isa,
            parameter("gamma", (spec.channels,), "float32"),
            parameter("beta", (spec.channels,), "float32"),
            declare_requant(spec.channels) if spec.quantize == "static" else None,
            parameter("h", (tiles, spec.channels, TILE), "float32"),
            *declare_quads(spec.quantize, tiles, spec.channels),
        )

    def emit(self, x: Any, tile: Any) -> None:
        """Normalise tile ``tile`` of ``x``."""
        quads = None if self.quads is None else words(self.quads)
        with T.serial(self.isa.parts) as part:
            self._part(x, quads, tile, part)

    def _part(self, x: Any, quads: Any, tile: Any, part: Any) -> None:
        isa, spec, lanes = self.isa, self.spec, self.isa.lanes
        at = lanes_of(part, isa)
        inverse_count = splat(1.0 / spec.channels, lanes)
        mean = T.Bind(sum_rows(spec.channels, lambda s, c: s + x[tile, c, at], isa) * inverse_count)

        def add_square(s: Any, c: Any) -> Any:
            difference = T.Bind(x[tile, c, at] - mean)
            return fma(difference, difference, s)

        variance = T.Bind(sum_rows(spec.channels, add_square, isa) * inverse_count)
        scale = T.Bind(rsqrt(variance + splat(spec.eps, lanes), lanes))
        shift = T.Bind(-(mean * scale))

        def normalized(c: Any) -> Any:
            y = fma(fma(x[tile, c, at], scale, shift), splat(self.gamma[c], lanes), splat(self.beta[c], lanes))
            y = T.Bind(y)
            T.buffer_store(self.h, y, [tile, c, at])
            return y

        if spec.quantize in ("bf16", "static"):
            round_all(spec.channels, normalized, self.requant, quads, tile, part, isa)
        elif spec.quantize == "per_token":
            low, high = isa.register("float32"), isa.register("float32")
            for register in (low, high):
                T.buffer_store(register, splat(0.0, lanes), [0])
            with T.serial(spec.channels // QUAD) as quad:
                widen(low, high, [normalized(quad * QUAD + i) for i in range(QUAD)])
            of_tile = {"quads": quads, "token_params": self.token_params, "tile": tile, "part": part}
            quantize_tokens(self.h, low[0], high[0], **of_tile, isa=isa)
        else:
            with T.serial(spec.channels) as c:
                normalized(c)


def sum_rows(count: int, add: Callable[[Any, Any], Any], isa: Isa) -> Any:
    """``add(…add(add(0, 0), 1)…, count − 1)`` in several chains, whose sums are added in a tree."""
    chains = [isa.register("float32") for _ in range(min(_CHAINS, count))]
    for chain in chains:
        T.buffer_store(chain, splat(0.0, isa.lanes), [0])

    def step(first: Any, length: int) -> None:
        for i, chain in enumerate(chains[:length]):
            T.buffer_store(chain, add(chain[0], first + i), [0])

    with T.serial(count // len(chains)) as i:
        step(i * len(chains), len(chains))
    step(count // len(chains) * len(chains), count % len(chains))
    sums = [chain[0] for chain in chains]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) // 2 * 2 :]
    return sums[0]


def layer_norm(spec: LayerNormSpec, isa: Isa) -> tirx.PrimFunc:
    """Layer norm kernel, parallel over tiles; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("layer_norm")
            tiles = named("tiles", T.int64())
            x = parameter("x", (tiles, spec.channels, TILE), "float32")
            norm = Norm.declare(spec, isa, tiles)
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(tiles) as tile:
                    norm.emit(x, tile)
        return builder.get()
