"""What follows the multiplications of a dense layer: scale and bias, activation, residual, and the output's layout.

Shared by all families and instruction sets, so that a layer gives the same bytes whichever kernel computed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.gemm import Block, named, parameter
from whet.schedules.isa import TILE, Isa, fma, quantize4, round4, round_bf16, round_int, splat, view
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
            requant=parameter("requant", (2,), "float32") if layer.output == "quads" else None,
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
        elif self.layer.output == "pairs":
            for i in range(0, len(values), 2):
                pair = round_bf16(*values[i : i + 2])
                T.buffer_store(_words(self.outputs[0]), pair, [where[0], (row + i) // 2, where[1]])
        elif self.layer.output == "quads":
            self._store_quad(row, where, values)
        else:
            self._store_head(row, where, values)

    def _store_quad(self, row: Any, where: Any, values: list[Any]) -> None:
        lanes = self.isa.lanes
        inverse, zero = (splat(self.requant[i], lanes) for i in (0, 1))
        packed = quantize4(values, inverse, zero, lanes)
        T.buffer_store(_words(self.outputs[0]), packed, [where[0], row // QUAD, where[1]])

    def _store_head(self, row: Any, where: Any, values: list[Any]) -> None:
        """Rows 0…H are Q, then K, then V; a quad of rows is all of one of them."""
        lanes = self.isa.lanes
        hidden = self.layer.out_features // 3
        q, k, v = self.outputs

        with T.If(row < hidden):
            with T.Then():
                packed = round4([y + splat(128.0, lanes) for y in values], lanes)
                T.buffer_store(_words(q), packed, [where[0], row // QUAD, where[1]])
            with T.Else(), T.If(row < 2 * hidden):
                with T.Then():
                    packed = round4(values, lanes, signed=True)
                    T.buffer_store(_words(k), packed, [where[0], (row - hidden) // QUAD, where[1]])
                with T.Else():
                    low, high = (splat(end, lanes, "int32") for end in (-128, 127))
                    for i, y in enumerate(values):
                        narrow = T.cast(T.min(T.max(round_int(y, lanes), low), high), f"int8x{lanes}")
                        T.buffer_store(v, narrow, [where[0], row - 2 * hidden + i, where[1]])


def _declare_outputs(layer: DenseSpec, tiles: Any) -> tuple[Any, ...]:
    n = layer.out_features
    if layer.output == "tiles":
        return (parameter("out", (tiles, n, TILE), "float32"),)
    if layer.output == "pairs":
        return (parameter("out", (tiles, n // 2, TILE, 2), "uint16"),)
    if layer.output == "quads":
        return (parameter("out", (tiles, n // QUAD, TILE, QUAD), "uint8"),)
    hidden = n // 3
    return (
        parameter("q", (tiles, hidden // QUAD, TILE, QUAD), "uint8"),
        parameter("k", (tiles, hidden // QUAD, TILE, QUAD), "int8"),
        parameter("v", (tiles, hidden, TILE), "int8"),
    )


def _words(quads: Any) -> Any:
    """Show quads or pairs as one int32 per token."""
    return named("words", view(quads, quads.shape[:3], "int32"))
