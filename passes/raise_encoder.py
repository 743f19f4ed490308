"""Raise a graph of tensor operations to the encoder dialect.

Precondition: a frontend has walked its graph with the rules of raise_rules.py and holds the fact of the output.
Postcondition: a module whose ``main(ids, positions, token_types, segments)`` is that output in the dialect: one call
per embedding, dense layer, layer norm, attention, pooling. What does not fit raises NotAnEncoder with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax, tirx

from . import dialect
from .raise_facts import Array, Linear, Matrix, Node, Norm, NotAnEncoder, Op, Rows, Tokens, group
from .raise_rules import Rules, join


@dataclass(frozen=True)
class Encoder:
    """A raised graph: the module, what its result is per, and the sizes of its embedding tables."""

    module: IRModule
    per_request: bool
    channels: int
    hidden: int
    vocab_size: int
    max_length: int
    type_vocab_size: int


def raise_encoder(rules: Rules, outputs: Sequence[Tokens]) -> Encoder:
    """Emit the graph of one output, or of several linear layers of one input as a single one (start and end logits)."""
    settled = [rules.settle(output) for output in outputs]
    for tokens in settled:
        per_token = () if tokens.node.per_request else (rules.probes.token,)
        if tokens.flat != (*group(rules.probes.batch), *per_token, *tokens.channels):
            raise NotAnEncoder(f"gives an output of shape {tokens.shape(0)}, neither per token nor per request")
    nodes = [tokens.node for tokens in settled]
    if len(nodes) == 1:
        return _Emitter().run(nodes[0])
    linear = [node for node in nodes if isinstance(node, Linear)]
    if len(linear) < len(nodes) or any(node.x is not linear[0].x for node in linear):
        raise NotAnEncoder("gives several outputs that are not linear layers of the same value")
    return _Emitter().run(join(linear))


class _Emitter:
    """Turns nodes into bindings, each once."""

    def __init__(self) -> None:
        tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
        token = relax.TensorType((tiles, dialect.TILE), "int32")
        self.ids, self.positions, self.token_types = (
            relax.Var(name, token) for name in ("ids", "positions", "token_types")
        )
        self.segments = relax.Var("segments", relax.TensorType((groups, dialect.TILE, 2), "int32"))
        self.builder = relax.BlockBuilder()
        self.values: dict[Node, relax.Expr] = {}

    def run(self, output: Node) -> Encoder:
        order = _sorted(output)
        rows, names = _embeddings(order), _names(order)
        with self.builder.function("main", [self.ids, self.positions, self.token_types, self.segments]):
            with self.builder.dataflow():
                for node in order:
                    call = self.call(node, names[node])
                    self.values[node] = self.builder.emit(call, name_hint=names[node])
                result = self.builder.emit_output(self.values[output])
            self.builder.emit_func_output(result)
        assert rows.word is not None and rows.position is not None
        return Encoder(
            self.builder.get(),
            output.per_request,
            output.channels,
            rows.channels,
            vocab_size=len(rows.word.values),
            max_length=len(rows.position.values),
            type_vocab_size=1 if rows.token_type is None else len(rows.token_type.values),
        )

    def call(self, node: Node, name: str) -> relax.Call:
        """The dialect op of a node whose inputs are emitted."""
        inputs = [self.values[x] for x in _inputs(node)]
        match node:
            case Norm(x=Rows() as rows):
                return self.embed(rows, node)
            case Norm():
                gamma, beta = _vector(node.gamma), _vector(node.beta)
                return dialect.layer_norm(inputs[0], gamma, beta, eps=node.eps)
            case Linear():
                weight, bias = self.weight(node.weight, f"{name}_weight"), _vector(node.bias)
                return dialect.dense(inputs[0], weight, bias, activation=node.activation)  # type: ignore[arg-type]
            case Op():
                segments = [self.segments] if node.name in ("attention", "pool") else []
                call: relax.Call = getattr(dialect, node.name)(*inputs, *segments, **node.attrs)
                return call
            case _:
                raise TypeError(f"{type(node).__name__} can't be emitted")

    def embed(self, rows: Rows, norm: Norm) -> relax.Call:
        nothing = Matrix(np.zeros((1, rows.channels), np.float32))
        tables = {"word": rows.word, "position": rows.position, "token_type": rows.token_type}
        word, position, token_type = (self.weight(table or nothing, f"{kind}_table") for kind, table in tables.items())
        gamma, beta = _vector(norm.gamma), _vector(norm.beta)
        inputs = (self.ids, self.positions, self.token_types)
        return dialect.embed(*inputs, word, position, token_type, gamma, beta, eps=norm.eps)

    def weight(self, matrix: Matrix, name: str) -> relax.Expr:
        if matrix.scale is None:
            return relax.const(np.ascontiguousarray(matrix.values, np.float32))
        values = relax.const(np.ascontiguousarray(matrix.values, np.int8))
        return self.builder.emit(dialect.quantized_weight(values, _vector(matrix.scale)), name_hint=name)


def _inputs(node: Node) -> tuple[Node, ...]:
    match node:
        case Norm(x=Rows()):
            return ()
        case Norm() | Linear():
            return (node.x,)
        case Op():
            return node.inputs
        case _:
            return ()


def _sorted(output: Node) -> list[Node]:
    """The nodes an output needs, inputs first. Iterative: deep models would exhaust Python's stack."""
    done: dict[Node, None] = {}  # a set that keeps its order
    pending = [output]
    while pending:
        missing = [x for x in _inputs(pending[-1]) if x not in done]
        if missing:
            pending.extend(reversed(missing))
        else:
            done.setdefault(pending.pop())
    return list(done)


def _embeddings(order: Sequence[Node]) -> Rows:
    """The one place where a graph reads its embedding tables."""
    found = [node.x for node in order if isinstance(node, Norm) and isinstance(node.x, Rows)]
    if any(isinstance(node, Rows) for node in order):
        raise NotAnEncoder("uses embeddings that no layer norm follows")
    if len(found) != 1:
        raise NotAnEncoder(f"has {len(found)} embedding layers, expected one")
    rows = found[0]
    if rows.word is None or rows.position is None:
        raise NotAnEncoder(f"has no {'word' if rows.word is None else 'position'} embeddings")
    return rows


def _names(order: Sequence[Node]) -> dict[Node, str]:
    """Names by role, as the Hugging Face importer gives them; layers are counted by their attention."""
    names: dict[Node, str] = {}
    layer = -1
    dense: Iterator[str] = iter(())
    norms: Iterator[str] = iter(())
    for node in order:
        match node:
            case Norm(x=Rows()):
                names[node] = "embeddings"
            case Op(name="attention", inputs=inputs):
                layer += 1
                names |= {x: f"layer_{layer}_{role}" for x, role in zip(inputs, ("query", "key", "value"), strict=True)}
                names[node] = f"layer_{layer}_context"
                dense, norms = iter(("attention_output", "intermediate", "output")), iter(("attention", "output"))
            case Linear(name=name):
                projects = any(isinstance(x, Op) and x.name == "attention" and node in x.inputs for x in order)
                role = "" if node.per_request or projects else next(dense, "")
                names[node] = f"layer_{layer}_{role}" if role else name.rsplit(".", 1)[-1] or "dense"
            case Norm(x=x):
                role = "" if node.per_request else next(norms, "")
                names[node] = f"layer_{layer}_{role}_norm" if role else "norm"
                if role and x in names:
                    names[x] = f"layer_{layer}_{role}_sum"
            case Op(name=name):
                names[node] = {"pool": "pooled", "normalize": "normalized"}.get(name, name)
    return names


def _vector(values: Array) -> Any:
    return relax.const(np.ascontiguousarray(values, np.float32))
