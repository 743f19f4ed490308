"""The first token of each request, one column per request, in the form that the value has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import Quantization, check_quads, declare_quads, lanes_of, words
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, splat


@dataclass(frozen=True)
class FirstTokensSpec:
    """First tokens: arguments x ``(nt, C, 16)`` float32, segments ``(ng, 16, 2)`` int32, out ``(ng, C, 16)`` float32.

    ``quantize`` is what x was rounded to, and out is: ``bf16``, pairs ``(…, C/2, 16, 2)``; ``static``, quads
    ``(…, C/4, 16, 4)``. Entries of length 0 give 0.
    """

    channels: int
    quantize: Quantization = "none"

    def __post_init__(self) -> None:
        if self.quantize == "per_token":
            raise ValueError("quantize is 'per_token'; expected 'none', 'bf16' or 'static'")
        if self.quantize != "none":
            check_quads(self.channels)


def first_tokens(spec: FirstTokensSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel for first tokens, parallel over groups; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("first_tokens")
            tiles, groups = named("tiles", T.int64()), named("groups", T.int64())
            x = _declare(spec, "x", tiles)
            segments = parameter("segments", (groups, TILE, 2), "int32")
            out = _declare(spec, "out", groups)
            with T.sblock("root"):
                T.reads()
                T.writes()
                if spec.quantize != "none":  # as rows of 16 words of 32 bits, one of each token
                    x, out = words(x), words(out)
                rows = x.shape[1]
                with T.parallel(groups) as group:
                    with T.serial(rows) as row, T.serial(isa.parts) as part:
                        T.buffer_store(out, splat(0, isa.lanes, x.dtype), [group, row, lanes_of(part, isa)])
                    with T.serial(TILE) as lane:
                        start = named("start", T.Bind(segments[group, lane, 0]))
                        with T.If(segments[group, lane, 1] > 0), T.Then(), T.serial(rows) as row:
                            T.buffer_store(out, x[start // TILE, row, start % TILE], [group, row, lane])
        return builder.get()


def _declare(spec: FirstTokensSpec, name: str, tiles: Any) -> Any:
    if spec.quantize == "none":
        return parameter(name, (tiles, spec.channels, TILE), "float32")
    return named(name, declare_quads(spec.quantize, tiles, spec.channels)[0])
