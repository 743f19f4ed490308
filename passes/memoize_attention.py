"""Give every attention a second way: probabilities from a record of an earlier request (AttMemo, arXiv 2301.09262).

Before: the dialect as ``quantise`` leaves it, with int8 attention; requests may leave (``freeze_layers``). After:
``main`` takes a fifth input, the addresses of the requests' records. Q, K and V are computed only of requests that use
no record, and V alone, by a layer of its own, of those that do. Weights and scales stay as they are, so a request that
uses no record gets the bits that it had; so does one that uses the record of the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from whet.schedules.nearest_record import DIMENSIONS

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
    dimensions: int
    """Of the keys by which they are found."""


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
    return Records(digest.hexdigest(), len(heads), heads[0], DIMENSIONS)


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
    every = graph.params[3]
    records = relax.Var(INPUT, relax.TensorType((every.ty.shape[0], TILE, 2), "int64"))
    new: dict[relax.Expr, relax.Expr] = {}
    divisions: dict[relax.Expr, _Division] = {}
    values: dict[relax.Var, relax.Var] = {}

    def divide(builder: relax.BlockBuilder, segments: relax.Expr) -> _Division:
        """Divide a batch once, and again whenever requests have left it."""
        if segments not in divisions:
            some = new.get(segments, segments)
            theirs = records if some.same_as(every) else builder.emit(dialect.follow(records, some), name_hint=INPUT)
            divisions[segments] = _Division.of(builder, some, theirs)
        return divisions[segments]

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        new.update(zip(map(graph.source, graph.values[var].args), call.args, strict=True))
        if var in fused:
            division = divide(builder, graph.source(graph.values[fused[var]].args[1]))
            x, *others = call.args
            first, last = (
                builder.emit(dialect.part(x, tiles=tiles, last=last), name_hint=f"{var.name}_{name}")
                for tiles, last, name in zip(division.tiles, (False, True), ("first", "last"), strict=True)
            )
            values[fused[var]] = builder.emit(_values(graph, builder, var, last), name_hint=f"{var.name}_values")
            return dialect.dense(first, *others, **attributes(call))
        if var in layers:
            division = divide(builder, graph.source(graph.values[var].args[1]))
            return dialect.memoized_attention(
                call.args[0],
                division.computed,
                values[var],
                division.stored,
                division.records,
                tiles=var.ty.shape[0],
                layer=layers[var],
                **attributes(call),
            )
        return call

    return rewrite(module, visit, [records])


@dataclass(frozen=True)
class _Division:
    """Requests in two: the segments of those that use no record and of those that use one."""

    records: relax.Expr
    computed: relax.Var
    stored: relax.Var
    tiles: tuple[tirx.Var, tirx.Var]
    """How many each have."""

    @staticmethod
    def of(builder: relax.BlockBuilder, segments: relax.Expr, records: relax.Expr) -> _Division:
        calls = [dialect.divide(segments, records, stored=stored) for stored in (False, True)]
        computed, stored = (builder.emit(c, name_hint=n) for c, n in zip(calls, ("computed", "stored"), strict=True))
        first, last = (call.attrs["tiles"] for call in calls)
        return _Division(records, computed, stored, (first, last))


def _values(graph: Graph, builder: relax.BlockBuilder, qkv: relax.Var, x: relax.Expr) -> relax.Call:
    """The last third of the dense layer ``qkv``, of ``x``."""
    call = graph.values[qkv]
    weight = [graph.constant(a) for a in graph.producer(call.args[1]).args]
    values, scale, bias = (relax.const(a[len(a) // 3 * 2 :].copy()) for a in (*weight, graph.constant(call.args[2])))
    return dialect.dense(x, builder.emit(dialect.quantized_weight(values, scale)), bias, **attributes(call))
