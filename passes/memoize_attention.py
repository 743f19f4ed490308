"""Give every attention a second way: probabilities from a record of an earlier request (AttMemo, arXiv 2301.09262).

Before: the dialect as ``quantise`` leaves it, with int8 attention. After: ``main`` takes a fifth input, the addresses
of the requests' records. Q, K and V are computed only of requests that use no record, and V alone, by a layer of its
own, of those that do. Weights and scales stay as they are, so a request that uses no record gets the bits that it had;
so does one that uses the record of the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tvm import IRModule, relax

from . import dialect
from .dialect import TILE
from .graph import Graph, attributes, digest_of, is_call, rewrite

INPUT = "records"
"""Name of the fifth input, int64 ``(groups, 16, 2)``."""


@dataclass(frozen=True)
class Records:
    """What the records of a model hold."""

    identity: str
    """SHA-256 of all that the probabilities follow from: another model, or other scales, make other records."""
    layers: int
    heads: int


def records_of(module: IRModule) -> Records:
    """Describe the records of a module that ``memoize_attention`` can rewrite, the same for all instruction sets."""
    graph = Graph(module)
    digest = hashlib.sha256(digest_of(module).encode())
    heads = []
    for binding in graph.bindings:
        if isinstance(binding.value, relax.Call):
            digest.update(repr((binding.value.op.name, sorted(attributes(binding.value).items()))).encode())
        if is_call(binding.value, dialect.SELF_ATTENTION):
            heads.append(int(attributes(binding.value)["heads"]))
    if len(set(heads)) != 1:
        raise ValueError(f"memoizing needs layers with the same number of heads; this model's have {heads}")
    return Records(digest.hexdigest(), len(heads), heads[0])


def memoize_attention(module: IRModule) -> IRModule:
    """Rewrite as the module docstring says; ValueError where the model has no attention that allows it."""
    graph = Graph(module)
    attentions = [b.var for b in graph.bindings if is_call(b.value, dialect.SELF_ATTENTION)]
    if not attentions:
        raise ValueError("memoizing needs transformer layers; the model has none")
    layers = {var: i for i, var in enumerate(attentions)}
    fused = {graph.source(graph.values[var].args[0]): var for var in attentions}
    for qkv, var in fused.items():
        if "q_scale" not in attributes(graph.values[var]) or not is_call(graph.producer(qkv), dialect.DENSE):
            raise ValueError(
                f"{var.name}: memoizing needs int8 attention whose Q, K and V come from one dense layer; this model's "
                "do not"
            )
    tokens, segments = graph.params[0], graph.params[3]
    records = relax.Var(INPUT, relax.TensorType((segments.ty.shape[0], TILE, 2), "int64"))
    divisions = [dialect.divide(tokens, segments, records, stored=stored) for stored in (False, True)]
    sides: list[relax.Var] = []
    values: dict[relax.Var, relax.Var] = {}

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if var in fused:
            if not sides:
                names = ("computed", "stored")
                sides.extend(builder.emit(d, name_hint=n) for d, n in zip(divisions, names, strict=True))
            x, *others = call.args
            first, last = (
                builder.emit(dialect.part(x, tiles=d.attrs["tiles"], last=last), name_hint=f"{var.name}_{name}")
                for d, last, name in zip(divisions, (False, True), ("first", "last"), strict=True)
            )
            values[fused[var]] = builder.emit(_values(graph, builder, var, last), name_hint=f"{var.name}_values")
            return dialect.dense(first, *others, **attributes(call))
        if var in layers:
            computed, stored = sides
            tiles = tokens.ty.shape[0]
            return dialect.memoized_attention(
                call.args[0], computed, values[var], stored, records, tiles=tiles, layer=layers[var], **attributes(call)
            )
        return call

    return rewrite(module, visit, [records])


def _values(graph: Graph, builder: relax.BlockBuilder, qkv: relax.Var, x: relax.Expr) -> relax.Call:
    """The last third of the dense layer ``qkv``, of ``x``."""
    call = graph.values[qkv]
    weight = [graph.constant(a) for a in graph.producer(call.args[1]).args]
    values, scale, bias = (relax.const(a[len(a) // 3 * 2 :].copy()) for a in (*weight, graph.constant(call.args[2])))
    return dialect.dense(x, builder.emit(dialect.quantized_weight(values, scale)), bias, **attributes(call))
