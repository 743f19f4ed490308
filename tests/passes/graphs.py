"""Builds small dialect graphs for the tests of passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import IRModule, relax, tirx

from whet.passes import dialect
from whet.passes.dialect import TILE

VOCAB = 50


class Builder:
    """What a test writes a graph with: the inputs, seeded constants, and ``emit``."""

    def __init__(self) -> None:
        self.block = relax.BlockBuilder()
        self.random = np.random.default_rng(0)
        tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
        self.inputs = [
            relax.Var(name, relax.TensorType((tiles, TILE), "int32")) for name in ("ids", "positions", "token_types")
        ]
        self.segments = relax.Var("segments", relax.TensorType((groups, TILE, 2), "int32"))

    def array(self, *shape: int) -> np.ndarray:
        return self.random.normal(0, 0.5, shape).astype(np.float32)

    def const(self, *shape: int) -> relax.Expr:
        return relax.const(self.array(*shape))

    def emit(self, value: relax.Expr, name: str) -> relax.Var:
        return self.block.emit(value, name_hint=name)

    def embed(self, channels: int) -> relax.Var:
        tables = [self.const(VOCAB, channels), self.const(64, channels), self.const(2, channels)]
        norm = [relax.const(np.ones(channels, np.float32)), relax.const(np.zeros(channels, np.float32))]
        return self.emit(dialect.embed(*self.inputs, *tables, *norm, eps=1e-5), "embeddings")

    def dense(self, x: relax.Expr, rows: int, name: str, **attrs) -> relax.Var:
        columns = dialect.shape_of(x)[1]
        return self.emit(dialect.dense(x, self.const(rows, columns), self.const(rows), **attrs), name)


def build(write: Callable[[Builder], relax.Var]) -> IRModule:
    """``main`` of what ``write`` emits; it returns the result."""
    builder = Builder()
    with builder.block.function("main", [*builder.inputs, builder.segments]):
        with builder.block.dataflow():
            output = builder.block.emit_output(write(builder))
        builder.block.emit_func_output(output)
    return builder.block.get()


def encoder_layer(b: Builder, channels: int, heads: int, inner: int) -> relax.Var:
    """Embedding and one whole transformer layer, unfused, as importers make it."""
    h = b.embed(channels)
    q, k, v = (b.dense(h, channels, name) for name in ("query", "key", "value"))
    size = channels // heads
    context = b.emit(dialect.attention(q, k, v, b.segments, heads=heads, scale=size**-0.5), "context")
    out = b.dense(context, channels, "out")
    norm = [relax.const(np.ones(channels, np.float32)), relax.const(np.zeros(channels, np.float32))]
    h = b.emit(dialect.layer_norm(b.emit(dialect.add(out, h), "sum1"), *norm, eps=1e-5), "norm1")
    up = b.emit(dialect.activate(b.dense(h, inner, "up"), kind="gelu"), "gelu")
    down = b.dense(up, channels, "down")
    return b.emit(dialect.layer_norm(b.emit(dialect.add(h, down), "sum2"), *norm, eps=1e-5), "norm2")


def requests(*lengths: int) -> list[np.ndarray]:
    """Seeded token ids."""
    random = np.random.default_rng(1)
    return [random.integers(0, VOCAB, n) for n in lengths]


def ops(module: IRModule) -> list[str]:
    """Names of the ops of ``main``, in order."""
    bindings = [b for block in module["main"].body.blocks for b in block.bindings]
    return [b.value.op.name.removeprefix(dialect.PREFIX) for b in bindings if isinstance(b.value, relax.Call)]
