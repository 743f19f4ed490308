"""Builds the encoder-dialect graph of a model from its family, its weights and its head.

Variables are named after what they are (``layer_0_query``, ``layer_0_attention_norm``, …): reports and calibration
show these names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tvm import IRModule, relax, tirx

from whet.passes import dialect
from whet.passes.dialect import TILE, Activation, Pooling

from .checkpoint import Array, Weights
from .families import Names, Sizes


@dataclass(frozen=True)
class Pool:
    """One value per request."""

    mode: Pooling


@dataclass(frozen=True)
class Dense:
    """A dense layer of the head."""

    weight: Array
    bias: Array
    activation: Activation
    name: str


@dataclass(frozen=True)
class Normalize:
    """Euclidean norm 1."""


Step: TypeAlias = Pool | Dense | Normalize
"""What can stand between the encoder's last hidden state and the output."""


def build_encoder(sizes: Sizes, names: Names, prefix: str, weights: Weights, head: Sequence[Step]) -> IRModule:
    """Build ``main(ids, positions, token_types, segments)`` of an encoder and its head.

    ``prefix`` stands before every name of ``names``. Raises ValueError for tensors that don't fit.
    """
    if sizes.hidden % sizes.heads:
        raise ValueError(f"{weights.source}: {sizes.hidden} hidden channels can't be divided among {sizes.heads} heads")
    builder = relax.BlockBuilder()
    tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
    ids, positions, token_types = (
        relax.Var(name, relax.TensorType((tiles, TILE), "int32")) for name in ("ids", "positions", "token_types")
    )
    segments = relax.Var("segments", relax.TensorType((groups, TILE, 2), "int32"))

    def take(name: str, *shape: int) -> relax.Expr:
        return relax.const(weights.take(prefix + name, shape))

    def norm(name: str) -> tuple[relax.Expr, relax.Expr]:
        return take(name + ".weight", sizes.hidden), take(name + ".bias", sizes.hidden)

    def emit(name: str, value: relax.Expr) -> relax.Var:
        return builder.emit(value, name_hint=name)

    with builder.function("main", [ids, positions, token_types, segments]):
        with builder.dataflow():
            x = emit(
                "embeddings",
                dialect.embed(
                    ids,
                    positions,
                    token_types,
                    take(names.word + ".weight", sizes.vocab, sizes.hidden),
                    take(names.position + ".weight", sizes.positions, sizes.hidden),
                    take(names.token_type + ".weight", sizes.types, sizes.hidden)
                    if sizes.types
                    else relax.const(np.zeros((1, sizes.hidden), np.float32)),
                    *norm(names.embedding_norm),
                    eps=sizes.layer_norm_eps,
                ),
            )
            for i in range(sizes.layers):
                x = _layer(i, x, segments, sizes, names, take, emit)
            for step in head:
                x = _step(step, x, segments, emit)
            output = builder.emit_output(x)
        builder.emit_func_output(output)
    return builder.get()


def _layer(
    i: int,
    x: relax.Var,
    segments: relax.Var,
    sizes: Sizes,
    names: Names,
    take: Callable[..., relax.Expr],
    emit: Callable[[str, relax.Expr], relax.Var],
) -> relax.Var:
    hidden, intermediate = sizes.hidden, sizes.intermediate

    def dense(value: relax.Var, tensor: str, label: str, n: int, k: int, activation: Activation = "none") -> relax.Var:
        name = names.layer.format(i) + tensor
        call = dialect.dense(value, take(name + ".weight", n, k), take(name + ".bias", n), activation=activation)
        return emit(f"layer_{i}_{label}", call)

    def add_norm(value: relax.Var, residual: relax.Var, tensor: str, label: str) -> relax.Var:
        name = names.layer.format(i) + tensor
        total = emit(f"layer_{i}_{label}_sum", dialect.add(value, residual))
        gamma, beta = take(name + ".weight", hidden), take(name + ".bias", hidden)
        return emit(f"layer_{i}_{label}_norm", dialect.layer_norm(total, gamma, beta, eps=sizes.layer_norm_eps))

    query = dense(x, names.query, "query", hidden, hidden)
    key = dense(x, names.key, "key", hidden, hidden)
    value = dense(x, names.value, "value", hidden, hidden)
    scale = 1 / math.sqrt(hidden // sizes.heads)
    context = dialect.attention(query, key, value, segments, heads=sizes.heads, scale=scale)
    attended = dense(emit(f"layer_{i}_context", context), names.attention_output, "attention_output", hidden, hidden)
    x = add_norm(attended, x, names.attention_norm, "attention")
    inner = dense(x, names.intermediate, "intermediate", intermediate, hidden, sizes.activation)
    return add_norm(dense(inner, names.output, "output", hidden, intermediate), x, names.output_norm, "output")


def _step(step: Step, x: relax.Var, segments: relax.Var, emit: Callable[[str, relax.Expr], relax.Var]) -> relax.Var:
    if isinstance(step, Pool):
        return emit("pooled", dialect.pool(x, segments, mode=step.mode))
    if isinstance(step, Dense):
        weight, bias = relax.const(step.weight), relax.const(step.bias)
        return emit(step.name, dialect.dense(x, weight, bias, activation=step.activation))
    return emit("normalized", dialect.normalize(x))
