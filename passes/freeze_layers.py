"""Let requests leave after chosen layers, answered by caches (Freeze, arXiv 2002.02645; GATI, arXiv 2101.07344).

Before: the dialect as ``quantise`` leaves it, or in floating point; the result is one column per request. After: behind
each chosen layer the requests are looked up in its cache; those whose answer is not trusted go on, their tokens moved
together. The result is the last answer that each request got, and two more channels: after how many layers, and the
trust in it. All other layers stay as they are, so requests that run to the end get the answers that they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .graph import Graph, arguments, is_call, is_per_request, is_per_token, rewrite

if TYPE_CHECKING:
    from whet.caching.cache import Cache


def freeze_layers(module: IRModule, caches: Sequence[Cache]) -> IRModule:
    """Rewrite as the module docstring says; ValueError where a cache does not fit the model."""
    if not caches:
        return module
    graph = Graph(module)
    borders = layer_borders(graph)
    result = graph.source(graph.result)
    expected = dialect.shape_of(borders[0])[1], dialect.shape_of(result)[1]
    caches = sorted(caches, key=lambda cache: cache.layer)
    cuts: dict[relax.Expr, int] = {}
    for number, cache in enumerate(caches):
        if not 0 <= cache.layer < len(borders):
            raise ValueError(f"a cache stands after layer {cache.layer}; expected 0 to {len(borders) - 1}")
        if (cache.channels, cache.outputs) != expected:
            raise ValueError(
                f"the cache after layer {cache.layer} is for {cache.channels} channels and {cache.outputs} outputs; "
                f"the model has {expected[0]} and {expected[1]}"
            )
        _check_cut(graph, borders[cache.layer], cache.layer)
        cuts[borders[cache.layer]] = number
    # One array for all, which holds nothing else: a session may change its thresholds.
    exits = relax.const(np.array([[c.layer for c in caches], [c.threshold for c in caches]], np.float32))
    segments: relax.Expr = graph.params[3]
    replaced: dict[relax.Var, relax.Expr] = {}
    answers: list[relax.Expr] = []

    def cut(builder: relax.BlockBuilder, h: relax.Var, number: int) -> None:
        nonlocal segments
        cache = caches[number]
        name = f"cache{cache.layer}"
        answer = builder.emit(
            dialect.lookup(h, segments, *map(relax.const, cache.arrays), kind=cache.kind), name_hint=f"{name}_answer"
        )
        stay = dialect.stay(answer, segments, exits, number=number)
        segments = builder.emit(stay, name_hint=f"{name}_segments")
        replaced[h] = builder.emit(dialect.move(h, segments, tiles=stay.attrs["tiles"]), name_hint=f"{name}_moved")
        answers.extend((answer, segments))

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        old = graph.values[var]
        for before, now in zip(old.args, call.args, strict=True):
            if graph.source(before) in cuts and now not in replaced:
                cut(builder, now, cuts[graph.source(before)])
        swapped = {graph.params[3]: segments, **replaced}
        call = relax.Call(
            call.op, [swapped.get(a, a) if isinstance(a, relax.Var) else a for a in call.args], call.attrs
        )
        if not var.same_as(result):
            return call
        first, *later = [*answers, builder.emit(call, name_hint=f"{var.name}_last")]
        # Each answer is for the requests of the segments before it.
        pairs = [value for i in range(0, len(later), 2) for value in (later[i + 1], later[i])]
        return dialect.settle(first, *pairs, layers=[*(cache.layer for cache in caches), len(borders)])

    return rewrite(module, visit)


def layer_borders(graph: Graph) -> list[relax.Var]:
    """The hidden state that each layer reads, in order: after as many layers as its index says."""
    borders: list[relax.Var] = []
    for binding in graph.bindings:
        if is_call(binding.value, dialect.SELF_ATTENTION):
            qkv = graph.producer(binding.value.args[0])
            if not is_call(qkv, dialect.DENSE):
                raise ValueError(
                    "freezing needs attention whose Q, K and V come from one dense layer; this model's do not"
                )
            read = graph.producer(qkv.args[0])
            borders.append(graph.source(read.args[0] if is_call(read, dialect.SCALE_CHANNELS) else qkv.args[0]))
    if not borders:
        raise ValueError("freezing needs transformer layers; the model has none")
    return borders


def _check_cut(graph: Graph, border: relax.Var, layer: int) -> None:
    """Raise ValueError unless the hidden state is all that later layers know of the tokens."""
    order = {binding.var: i for i, binding in enumerate(graph.bindings)}
    for binding in graph.bindings[order[border] + 1 :]:
        for value in map(graph.source, arguments(binding.value)):
            tokens = isinstance(value, relax.Var) and value in (order.keys() | set(graph.params[:3]))
            if tokens and order.get(value, -1) < order[border] and _varies(graph, value):
                raise ValueError(
                    f"after layer {layer} the model still reads {value.name}, which is older; no request can leave "
                    "there"
                )


def _varies(graph: Graph, value: relax.Var) -> bool:
    """Whether a value has something of each token or request."""
    return bool(value.ty.shape) and (is_per_token(graph, value) or is_per_request(graph, value))
