"""Embedding: the sum of a word, a position and a token type row per token, then layer norm.

Rows are gathered 16 channels at a time and transposed in registers into tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import Quantization
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa, splat
from whet.schedules.layer_norm import LayerNormSpec, Norm
from whet.schedules.tiles import rows_to_tile


@dataclass(frozen=True)
class EmbedSpec:
    """Embedding tables and the layer norm behind them.

    Arguments: ids, positions, token_types int32 ``(nt, 16)``; word ``(vocab, C)`` float32, or int8 followed by
    word_scale ``(vocab,)`` float32; position ``(positions, C)`` and token_type ``(types, C)`` float32; then gamma, beta
    and the outputs of LayerNormSpec. Indices are not checked: they must lie inside the tables, those of lanes past
    the last token too.
    """

    vocab: int
    positions: int
    types: int
    channels: int
    eps: float
    table: Literal["f32", "i8"] = "f32"
    quantize: Quantization = "none"

    @property
    def norm(self) -> LayerNormSpec:
        """The layer norm; ValueError if the channels do not suit its quantisation."""
        return LayerNormSpec(self.channels, self.eps, self.quantize)


def embed(spec: EmbedSpec, isa: Isa) -> tirx.PrimFunc:
    """Embedding kernel, parallel over tiles; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("embed")
            tiles = named("tiles", T.int64())
            indices = [parameter(name, (tiles, TILE), "int32") for name in ("ids", "positions", "token_types")]
            quantized = spec.table == "i8"
            word = parameter("word", (spec.vocab, spec.channels), "int8" if quantized else "float32")
            word_scale = parameter("word_scale", (spec.vocab,), "float32") if quantized else None
            position = parameter("position", (spec.positions, spec.channels), "float32")
            token_type = parameter("token_type", (spec.types, spec.channels), "float32")
            norm = Norm.declare(spec.norm, isa, tiles)
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.parallel(tiles) as tile:

                    def first(token: int) -> list[Any]:
                        return [T.Bind(index[tile, token]) for index in indices]

                    def load(rows: list[Any], c: Any, lanes: int) -> Any:
                        at = c if lanes == 1 else T.ramp(c, 1, lanes)
                        value = word[rows[0], at]
                        if word_scale is not None:
                            scale = word_scale[rows[0]]
                            value = T.cast(value, _float(lanes)) * (scale if lanes == 1 else splat(scale, lanes))
                        return value + token_type[rows[2], at] + position[rows[1], at]

                    rows_to_tile(load, first, norm.h, tile, isa)
                    norm.emit(norm.h, tile)
        return builder.get()


def _float(lanes: int) -> str:
    return "float32" if lanes == 1 else f"float32x{lanes}"
