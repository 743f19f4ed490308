"""Reading and rewriting a dialect function: one straight line of bindings in one dataflow block."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from tvm import IRModule, relax
from tvm.ir import Op
from tvm.ir.expr import GenericConst

from . import dialect

Visit: TypeAlias = Callable[[relax.BlockBuilder, relax.Var, relax.Call], relax.Expr]


class Graph:
    """A read-only view of ``module["main"]``: its parameters, bindings, and who uses what."""

    def __init__(self, module: IRModule) -> None:
        self.function = module["main"]
        self.params: list[relax.Var] = list(self.function.params)
        self.bindings: list[relax.VarBinding] = [b for block in self.function.body.blocks for b in block.bindings]
        self.values: dict[relax.Var, relax.Expr] = {b.var: b.value for b in self.bindings}
        self.result: relax.Expr = self.function.body.body
        self.uses = Counter(arg for b in self.bindings for arg in arguments(b.value) if isinstance(arg, relax.Var))
        if isinstance(self.result, relax.Var):
            self.uses[self.result] += 1

    def producer(self, value: relax.Expr) -> relax.Expr:
        """The expression behind a variable; other expressions are returned as they are."""
        while isinstance(value, relax.Var) and value in self.values:
            value = self.values[value]
        return value

    def source(self, value: relax.Expr) -> relax.Expr:
        """The variable behind a chain of plain aliases (``gv = lv``)."""
        while isinstance(value, relax.Var) and isinstance(self.values.get(value), relax.Var):
            value = self.values[value]
        return value

    def sole_producer(self, value: relax.Expr, op: Op) -> relax.Call | None:
        """The ``op`` call that made ``value``, if nothing else uses its result."""
        call = self.values.get(value) if isinstance(value, relax.Var) else None
        return call if self.uses[value] == 1 and is_call(call, op) else None

    def constant(self, value: relax.Expr) -> np.ndarray[Any, Any]:
        """The contents of a constant."""
        node = self.producer(value)
        if not isinstance(node, GenericConst):
            raise ValueError(f"expected a constant, got {node}")
        return np.asarray(node.value.numpy())


def arguments(value: relax.Expr) -> list[relax.Expr]:
    """What an expression reads: the arguments of a call, or the variable of an alias."""
    if isinstance(value, relax.Call):
        return list(value.args)
    return [value] if isinstance(value, relax.Var) else []


def is_call(value: relax.Expr | None, op: Op) -> bool:
    """Whether ``value`` is a call of ``op``."""
    return isinstance(value, relax.Call) and isinstance(value.op, Op) and value.op.name == op.name


def attributes(call: relax.Call) -> dict[str, Any]:
    """A call's attributes as a Python dict."""
    return {k: (str(v) if isinstance(v, str) else v) for k, v in call.attrs.items()} if call.attrs else {}


def weight_of(graph: Graph, weight: relax.Expr) -> np.ndarray[Any, Any]:
    """A weight ``(rows, columns)`` as float32, whichever form it has."""
    made = graph.producer(weight)
    if is_call(made, dialect.QUANTIZED_WEIGHT):
        values, scale = (graph.constant(a) for a in made.args)
        return np.asarray(values.astype(np.float32) * scale[:, None])
    return graph.constant(made)


def is_per_token(graph: Graph, value: relax.Expr) -> bool:
    """Whether a value has a column per token (else it has one per request)."""
    return bool(value.ty.shape[0].same_as(graph.params[0].ty.shape[0]))


def is_per_request(graph: Graph, value: relax.Expr) -> bool:
    """Whether a value has a column per request, of all or of those that ``stay``."""
    stages = (b.var for b in graph.bindings if is_call(b.value, dialect.STAY))
    return any(bool(value.ty.shape[0].same_as(s.ty.shape[0])) for s in (graph.params[3], *stages))


def digest_of(module: IRModule) -> str:
    """SHA-256 of all constants, in order, with their shapes and dtypes: whether two models have the same weights."""
    digest = hashlib.sha256()
    for binding in Graph(module).bindings:
        for value in [binding.value, *arguments(binding.value)]:
            if isinstance(value, GenericConst):
                array = np.ascontiguousarray(value.value.numpy())
                digest.update(f"{array.dtype} {array.shape} ".encode())
                digest.update(array.data)
    return digest.hexdigest()


def rewrite(module: IRModule, visit: Visit, inputs: Sequence[relax.Var] = ()) -> IRModule:
    """Rebuild ``main``: ``visit(builder, old_variable, call_with_new_arguments)`` gives what to bind instead.

    ``visit`` may emit further bindings through the builder. Bindings that nothing uses any more are dropped; names of
    variables stay. ``inputs`` are parameters that ``main`` gets besides.
    """
    graph = Graph(module)
    builder = relax.BlockBuilder()
    renamed: dict[relax.Var, relax.Expr] = {}

    def new(value: relax.Expr) -> relax.Expr:
        return renamed.get(value, value) if isinstance(value, relax.Var) else value

    with builder.function("main", [*graph.params, *inputs]):
        with builder.dataflow():
            for binding in graph.bindings:
                value = binding.value
                if isinstance(value, relax.Call):
                    call = relax.Call(value.op, [new(a) for a in value.args], value.attrs, value.ty_args)
                    value = visit(builder, binding.var, call)
                else:
                    value = new(value)
                renamed[binding.var] = (
                    builder.emit(value, name_hint=binding.var.name) if isinstance(value, relax.Call) else value
                )
            output = builder.emit_output(new(graph.result))
        builder.emit_func_output(output)
    return relax.transform.DeadCodeElimination()(builder.get())
