"""Pool first tokens before the ops that look at each token by itself, not after them.

Before: the dialect as all passes but ``choose_kernels`` leave it. After: token-wise ops of whose result nothing but
the first tokens was read, by ``pool``, run on these alone, one column per request. In a classifier this is what follows
the last attention: its context is pooled, and so is the residual beside it, and the rest of the layer sees no other
tokens. The attention itself has ``first_only``. Each column is computed as before, so answers keep their bits.
"""

from __future__ import annotations

from tvm import IRModule, relax

from . import dialect
from .graph import Graph, arguments, attributes, is_call, rewrite

TOKEN_WISE = (
    dialect.DENSE,
    dialect.LAYER_NORM,
    dialect.STACK,
    dialect.ACTIVATE,
    dialect.ADD,
    dialect.SCALE_CHANNELS,
    dialect.NORMALIZE,
)
"""Ops that make each column of what the same columns of their arguments hold."""


def hoist_pooling(module: IRModule) -> IRModule:
    """Rewrite as the module docstring says."""
    graph = Graph(module)
    read = _read_at_first_tokens(graph)
    attended = {var for var in read if is_call(graph.values[var], dialect.SELF_ATTENTION)}
    hoisted = {var: segments for var, segments in read.items() if var not in attended}
    new: dict[relax.Expr, relax.Expr] = {}
    pooled: dict[relax.Expr, relax.Expr] = {}

    def first_tokens(builder: relax.BlockBuilder, value: relax.Var, segments: relax.Expr) -> relax.Expr:
        """One column per request of an old value."""
        if value in hoisted:
            return new[value]
        if value not in pooled:
            pool = dialect.pool(new[value], new.get(segments, segments), mode="cls")
            pooled[value] = builder.emit(pool, name_hint=f"{value.name}_first")
        return pooled[value]

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        old = [graph.source(a) for a in graph.values[var].args]
        new.update(zip(old, call.args, strict=True))
        if _pools_first_tokens(call) and old[0] in hoisted:
            return new[old[0]]
        if var in attended:
            return dialect.self_attention(*call.args, **attributes(call) | {"first_only": True})
        if var not in hoisted:
            return call
        args = [
            first_tokens(builder, a, hoisted[var]) if _same_tokens(a, var) else b
            for a, b in zip(old, call.args, strict=True)
        ]
        return relax.Call(call.op, args, call.attrs)

    return rewrite(module, visit)


def _read_at_first_tokens(graph: Graph) -> dict[relax.Var, relax.Expr]:
    """Results that nothing reads but at first tokens, of token-wise ops and attention; with the segments of these."""
    found: dict[relax.Var, relax.Expr] = {}
    segments: dict[relax.Expr, relax.Expr] = {}
    whole = {graph.source(graph.result)}
    for binding in reversed(graph.bindings):  # readers before what they read
        var, call = binding.var, binding.value
        read = [graph.source(a) for a in arguments(call)]
        if _pools_first_tokens(call):
            segments[read[0]] = read[1]
        elif var in segments and var not in whole and any(is_call(call, op) for op in TOKEN_WISE):
            found[var] = segments[var]
            segments.update((a, segments[var]) for a in read if _same_tokens(a, var))
        elif var in segments and var not in whole and is_call(call, dialect.SELF_ATTENTION):
            found[var] = segments[var]
            whole.update(read)
        elif isinstance(call, relax.Call):
            whole.update(read)
    return found


def _pools_first_tokens(call: relax.Expr) -> bool:
    return is_call(call, dialect.POOL) and attributes(call)["mode"] == "cls"


def _same_tokens(value: relax.Expr, result: relax.Var) -> bool:
    """Whether an argument has the columns of the result (and is no weight)."""
    return bool(value.ty.shape[0].same_as(result.ty.shape[0]))
