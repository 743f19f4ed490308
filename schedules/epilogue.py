"""What follows the multiplications of a dense layer: scale and bias, activation, residual, and the output's layout.

Shared by all families and instruction sets, so that a layer gives the same bytes whichever kernel computed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import HEADS, QUAD, DenseSpec
from whet.schedules.elementwise import declare_requant, quantize_channels
from whet.schedules.gemm import Block, named, parameter
from whet.schedules.isa import TILE, Isa, fma, round4, round_bf16, round_bf16_row, round_int, splat, view
from whet.schedules.vector_math import ACTIVATIONS, ROUGH_ACTIVATIONS


@dataclass(frozen=True)
class Epilogue:
    """The epilogue's parameters, declared in the order that the kernel takes them, and the code that uses them."""

    layer: DenseSpec
    isa: Isa
    scale: Any
    bias: Any
    row_sums: Any
    token_params: Any
    residual: Any
    requant: Any
    outputs: tuple[Any, ...]

    @staticmethod
    def declare(layer: DenseSpec, isa: Isa, tiles: Any) -> Epilogue:
        """Declare scale, bias, row_sums, token_params, residual, requant (those the layer has) and the outputs."""
        n = layer.out_features
        return Epilogue(
            layer,
            isa,
            scale=parameter("scale", (n,), "float32") if layer.is_integer else None,
            bias=parameter("bias", (n,), "float32"),
            row_sums=parameter("row_sums", (n,), "float32") if layer.per_token else None,
            token_params=parameter("token_params", (tiles, 2, TILE), "float32") if layer.per_token else None,
            residual=parameter("residual", (tiles, n, TILE), "float32") if layer.residual else None,
            requant=declare_requant(n) if layer.output == "quads" else None,
            outputs=_declare_outputs(layer, tiles),
        )

    @property
    def together(self) -> int:
        """Rows that are stored together: a quad, or one where the layer has no whole quads."""
        return 1 if self.layer.out_features % QUAD else QUAD

    def emit(self, block: Block) -> None:
        """Store one group of finished rows."""
        with T.serial(block.rows // self.together) as i:
            self.emit_part(block, i)

    def emit_part(self, block: Block, i: Any) -> None:
        """Store the rows of the group from ``i * together`` on, ``together`` of them."""
        together, lanes = self.together, self.isa.lanes
        first = named("row", T.Bind(block.first_row + i * together))
        constants = [self._row_constants(first + r) for r in range(together)]
        with T.serial(block.tiles) as t:
            tile = named("tile", T.Bind(block.first_tile + t))
            for part in range(self.isa.parts):
                where = (tile, T.ramp(part * lanes, 1, lanes))
                values = [
                    self._finished(
                        block.sums[block.first_sum + t, i * together + r, where[1]], first + r, constants[r], where
                    )
                    for r in range(together)
                ]
                self._store(first, where, values)

    def _row_constants(self, row: Any) -> tuple[Any, ...]:
        buffers = (self.bias, self.scale, self.row_sums)
        return tuple(T.Bind(splat(b[row], self.isa.lanes)) for b in buffers if b is not None)

    def _finished(self, total: Any, row: Any, of_row: tuple[Any, ...], where: Any) -> Any:
        """Value of one vector of a row, after activation and residual."""
        rough = self.layer.output in ("pairs", "quads") and self.layer.weight != "f32"
        activation = (ROUGH_ACTIVATIONS if rough else ACTIVATIONS)[self.layer.activation]
        y = activation(self._value(total, of_row, where), self.isa.lanes)
        if self.layer.residual:
            y = y + self.residual[where[0], row, where[1]]
        return T.Bind(y)

    def _value(self, total: Any, of_row: tuple[Any, ...], where: Any) -> Any:
        """The layer's result before its activation."""
        if not self.layer.is_integer:
            return total + of_row[0]
        acc = T.cast(total, f"float32x{self.isa.lanes}")
        if not self.layer.per_token:
            return fma(acc, of_row[1], of_row[0])
        bias, scale, row_sum = of_row
        token_scale, token_zero = (self.token_params[where[0], i, where[1]] for i in (0, 1))
        return fma(fma(acc, token_scale, -(row_sum * token_zero)), scale, bias)

    def _store(self, row: Any, where: Any, values: list[Any]) -> None:
        """Store the vectors of ``row`` and those after it."""
        if self.layer.output == "tiles":
            for i, y in enumerate(values):
                T.buffer_store(self.outputs[0], y, [where[0], row + i, where[1]])
        elif self.layer.output in HEADS:
            self._store_head(row, where, values)
        else:
            self._store_words(self.outputs[0], row, where, self._packed(row, values))

    def _packed(self, row: Any, values: list[Any]) -> list[Any]:
        """Words of the next layer's input, from ``row`` and those after it."""
        if self.layer.output == "pairs":
            return _pairs(values)
        return [quantize_channels(values, row, self.requant, self.isa)]

    def _store_words(self, out: Any, row: Any, where: Any, words: list[Any]) -> None:
        """Store the words of a quad of rows."""
        for i, word in enumerate(words):
            T.buffer_store(_words(out), word, [where[0], row // QUAD * len(words) + i, where[1]])

    def _store_head(self, row: Any, where: Any, values: list[Any]) -> None:
        """Rows 0…H are Q, then K, then V, or those of them that the layer has; a quad of rows is all of one of them."""
        lanes = self.isa.lanes
        parts = HEADS[self.layer.output]
        hidden = self.layer.out_features // len(parts)
        integer = self.layer.is_integer

        def store(part: str, out: Any, row: Any) -> None:
            if part == "q":
                shifted = [round4([y + splat(128.0, lanes) for y in values], lanes)] if integer else _pairs(values)
                self._store_words(out, row, where, shifted)
            elif part == "k":
                words = [round4(values, lanes, signed=True)] if integer else _pairs(values)
                self._store_words(out, row, where, words)
            else:
                for i, y in enumerate(values):
                    narrow = _signed_byte(y, lanes) if integer else round_bf16_row(y)
                    T.buffer_store(out, narrow, [where[0], row + i, where[1]])

        def store_from(i: int) -> None:
            if i == len(parts) - 1:
                store(parts[i], self.outputs[i], row - i * hidden)
                return
            with T.If(row < (i + 1) * hidden):
                with T.Then():
                    store(parts[i], self.outputs[i], row - i * hidden)
                with T.Else():
                    store_from(i + 1)

        store_from(0)


def _pairs(values: list[Any]) -> list[Any]:
    return [round_bf16(*values[i : i + 2]) for i in range(0, len(values), 2)]


def _signed_byte(y: Any, lanes: int) -> Any:
    low, high = (splat(end, lanes, "int32") for end in (-128, 127))
    return T.cast(T.min(T.max(round_int(y, lanes), low), high), f"int8x{lanes}")


def _declare_outputs(layer: DenseSpec, tiles: Any) -> tuple[Any, ...]:
    n = layer.out_features
    if layer.output == "tiles":
        return (parameter("out", (tiles, n, TILE), "float32"),)
    in_word, unsigned, signed = (QUAD, "uint8", "int8") if layer.weight != "bf16" else (2, "uint16", "uint16")
    if layer.output not in HEADS:
        return (parameter("out", (tiles, n // in_word, TILE, in_word), unsigned),)
    parts = HEADS[layer.output]
    hidden = n // len(parts)
    words = (tiles, hidden // in_word, TILE, in_word)
    kinds = {"q": (words, unsigned), "k": (words, signed), "v": ((tiles, hidden, TILE), signed)}
    return tuple(parameter(part, *kinds[part]) for part in parts)


def _words(quads: Any) -> Any:
    """Show quads or pairs as one int32 per token."""
    return named("words", view(quads, quads.shape[:3], "int32"))
