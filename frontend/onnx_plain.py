"""Turns an ONNX graph that is not an encoder into a plain Relax function, fp32, of symbolic batch and sequence.

TVM's own importer loses shapes in the arithmetic that exporters write around reshapes, so it is not used. Here, as in
raising, what follows from shapes and constants alone is computed at a few concrete sizes of the batch, and a number
that has to stand in the graph is the expression ``a + b · batchⁱ · sequenceʲ`` that gives all of them.

Quantised arithmetic becomes the real arithmetic that it stands for: no rounding, weights dequantised.
The rules for operators are in onnx_plain_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from tvm import IRModule, relax, sym, tirx

from whet.passes.raise_facts import Array

from .onnx_graph import Node, as_float32, constants, inputs_of, needed, static_dims

SIZES = ((3, 13), (5, 11), (2, 7))
"""Batch and sequence at which shapes are computed."""

_POWERS = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))
"""Exponents of batch and sequence that dimensions have."""


@dataclass(frozen=True)
class Value:
    """A tensor: ``expr`` in the graph, and ``known`` (one array for each of SIZES) if it follows from shapes alone."""

    expr: relax.Expr | None = None
    known: tuple[Array, ...] | None = None

    @property
    def fixed(self) -> Array | None:
        """The array, if it is a constant."""
        if self.known is None or any(v.shape != self.known[0].shape for v in self.known):
            return None
        return (
            self.known[0]
            if all(np.array_equal(v, self.known[0], equal_nan=v.dtype.kind == "f") for v in self.known)
            else None
        )


Rule: TypeAlias = "Callable[[Plain, Node, list[Value | None]], relax.Expr | Value | tuple[relax.Expr | Value, ...]]"
RULES: dict[str, Rule] = {}


class Plain:
    """The importer. Rules read ``tensor`` (an expression) or ``ints`` (numbers that follow from shapes)."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self.builder = relax.BlockBuilder()
        self.sizes = (tirx.Var("batch", "int64"), tirx.Var("sequence", "int64"))
        self.analyzers = [sym.Analyzer() for _ in SIZES]
        for analyzer, at in zip(self.analyzers, SIZES, strict=True):
            for size, length in zip(self.sizes, at, strict=True):
                analyzer.bind(size, tirx.IntImm("int64", length))

    def run(self, outputs: Sequence[str]) -> IRModule:
        """``main`` of all inputs of the file."""
        params = [relax.Var(value.name, self._type(value)) for value in inputs_of(self.graph)]
        values = {param.name: Value(param) for param in params}
        with self.builder.function("main", params):
            try:
                with self.builder.dataflow():
                    found = [self.tensor(value) for value in self._walk(self.graph, values, outputs)]
                    result = self.builder.emit_output(found[0] if len(found) == 1 else relax.Tuple(found))
            except ValueError:
                self.builder.emit_func_output(params[0])  # else the builder complains, over the error that matters
                raise
            self.builder.emit_func_output(result)
        return relax.transform.DeadCodeElimination()(self.builder.get())

    def _type(self, value: onnx.ValueInfoProto) -> relax.TensorType:
        dims = static_dims(value)
        shape = [d if d is not None else self.sizes[i] if i < 2 else -1 for i, d in enumerate(dims)]
        if -1 in shape:
            raise ValueError(f"input {value.name!r} has more than two dynamic dimensions")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        return relax.TensorType(shape, str(dtype))

    def _walk(self, graph: onnx.GraphProto, outer: dict[str, Value], outputs: Sequence[str]) -> list[Value]:
        values = {**outer}
        values |= {name: Value(known=(array,) * len(SIZES)) for name, array in constants(graph).items()}
        for node in needed(graph, outputs):
            try:
                results = self._node(node, values)
            except Exception as error:
                if isinstance(error, ValueError) and str(error).startswith("node "):
                    raise
                raise ValueError(f"{node} can't be compiled: {error}") from error
            values |= dict(zip(node.outputs, results, strict=False))
        return [values[name] for name in outputs]

    def _node(self, node: Node, values: dict[str, Value]) -> Sequence[Value]:
        inputs = [values[name] if name else None for name in node.inputs]
        if node.op == "If":
            condition = inputs[0].fixed if inputs[0] else None
            if condition is None:
                raise ValueError("it branches on what the inputs hold")
            branch = node.attrs["then_branch" if condition.all() else "else_branch"]
            return self._walk(branch, values, [value.name for value in branch.output])
        known = None
        if all(x is None or x.known is not None for x in inputs):
            known = self._compute(node, {n: x.known for n, x in zip(node.inputs, inputs, strict=True) if x and x.known})
            if known is not None and all(self._small(arrays) for arrays in known):
                return [Value(known=arrays) for arrays in known]
        if node.op not in RULES:
            raise ValueError("this operator is not supported")
        results = RULES[node.op](self, node, inputs)
        found = [
            r if isinstance(r, Value) else Value(self.emit(r))
            for r in (results if isinstance(results, tuple) else (results,))
        ]
        return [Value(v.expr, known[i]) if known and i < len(known) else v for i, v in enumerate(found)]

    @staticmethod
    def _small(arrays: tuple[Array, ...]) -> bool:
        """Whether a computed value needs no expression: a constant, or a shape."""
        return Value(known=arrays).fixed is not None or (len({a.shape for a in arrays}) == 1 and arrays[0].size <= 16)

    def _compute(self, node: Node, inputs: dict[str, tuple[Array, ...]]) -> list[tuple[Array, ...]] | None:
        ends = [[onnx.ValueInfoProto(name=name) for name in names if name] for names in (inputs, node.outputs)]
        graph = onnx.helper.make_graph([node.proto], "one node", *ends)
        results = []
        for i in range(len(SIZES)):
            try:
                with np.errstate(all="ignore"):
                    found = ReferenceEvaluator(graph, opsets=self.opsets).run(
                        None, {n: v[i] for n, v in inputs.items()}
                    )
            except Exception:  # the reference lacks the operator; the rule may know it
                return None
            results.append([as_float32(np.asarray(value)) for value in found])
        return list(zip(*results, strict=True))

    # ------------------------------------------------------------------------------------------------- for the rules

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind an expression."""
        return expr if isinstance(expr, relax.Var) else self.builder.emit(expr)

    def slice(self, x: relax.Expr, dim: int, bounds: Sequence[tuple[int, int]], step: int = 1) -> relax.Expr:
        """Elements ``begin`` to ``end`` of a dimension, given at SIZES, with the simple expression of their number."""
        begin, end = zip(*bounds, strict=True)
        length = self.fit([max(0, -(-(e - b) // step)) for b, e in bounds])
        part = self.emit(
            relax.op.strided_slice(x, [dim], [self.fit(begin)], [self.fit(end)], [step], assume_inbound=True)
        )
        shape = [length if d == dim else n for d, n in enumerate(x.ty.shape)]
        return self.builder.match_cast(part, relax.TensorType(shape, x.ty.dtype))

    def tensor(self, value: Value | None) -> relax.Expr:
        """The expression of a value; shapes become tensors."""
        if value is None:
            raise ValueError("it lacks an input")
        if value.expr is not None:
            return value.expr
        assert value.known is not None
        if (array := value.fixed) is not None:
            return relax.const(array, str(array.dtype))
        shape, dtype = value.known[0].shape, str(value.known[0].dtype)
        numbers = [self.fit([int(v.reshape(-1)[i]) for v in value.known]) for i in range(value.known[0].size)]
        flat = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr(numbers)))
        whole = flat if len(shape) == 1 else self.emit(relax.op.reshape(flat, shape))
        return whole if dtype == "int64" else self.emit(relax.op.astype(whole, dtype))

    def fit(self, numbers: Sequence[int]) -> Any:
        """The expression of batch and sequence with these values at SIZES."""
        for powers in _POWERS:
            bases = [b ** powers[0] * s ** powers[1] for b, s in SIZES]
            step = Fraction(numbers[1] - numbers[0], bases[1] - bases[0]) if bases[1] != bases[0] else Fraction(0)
            start = numbers[0] - step * bases[0]
            fits = all(start + step * base == n for base, n in zip(bases, numbers, strict=True))
            if fits and step.denominator == start.denominator == 1:
                product: Any = int(step)
                for size, power in zip(self.sizes, powers, strict=True):
                    for _ in range(power if step else 0):
                        product = product * size
                return product + int(start) if start else product
        raise ValueError(f"a dimension is {numbers} for batches and lengths of {SIZES}: no simple expression of them")

    def shape(self, value: Value | None) -> list[tuple[int, ...]]:
        """The shape of a value at SIZES."""
        if value is not None and value.known is not None:
            return [v.shape for v in value.known]
        dims = self.tensor(value).ty.shape
        return [tuple(int(analyzer.simplify(dim)) for dim in dims) for analyzer in self.analyzers]

    def ints(self, value: Value | None) -> list[list[int]] | None:
        """The numbers of a value that follows from shapes, at SIZES; None if it was left out."""
        if value is None:
            return None
        if value.known is None:
            raise ValueError("a shape or an index depends on what the inputs hold")
        return [[int(n) for n in v.reshape(-1)] for v in value.known]

    def constant(self, value: Value | None) -> Array | None:
        """A constant; None if it was left out."""
        if value is None:
            return None
        if (array := value.fixed) is None:
            raise ValueError("an operand has to be a constant")
        return array


def plain_module(model: onnx.ModelProto, outputs: Sequence[str]) -> IRModule:
    """A Relax function of the file's inputs; ValueError names the node that can't be compiled, and why."""
    from . import onnx_plain_ops  # noqa: F401, PLC0415 - it registers its rules and imports this module

    return Plain(model).run(outputs)
