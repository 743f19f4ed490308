"""Walks an ONNX graph with the rules of whet.passes.raise_rules.

The rules are applied to the file's own operators rather than to a Relax import of them. An import would have to give
every intermediate value a symbolic shape (where TVM's importer fails on real files), would lose the integers of
quantised weights in casts and subtractions, and the masks and position ids, which exporters compute in a dozen ways,
would have to be matched by their syntax. Here they are just computed: everything that does not depend on an embedding
table is evaluated at the probes with ONNX's reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from whet.passes.raise_facts import PROBES, Array, DontCare, Fact, Known, NotAnEncoder
from whet.passes.raise_rules import Rules

from .onnx_graph import Node, as_float32, constants, needed

Values: TypeAlias = "dict[str, Fact]"
Result: TypeAlias = Fact | tuple[Fact, ...]
Rule: TypeAlias = Callable[["Walk", Node, list[Fact | None]], Result | None]

RULES: dict[str, Rule] = {}
"""By operator (``com.microsoft.`` before those of ONNX Runtime). A rule may decline what is known by returning None."""


class Walk:
    """One walk over a model. ``values`` maps names to facts."""

    def __init__(self, model: onnx.ModelProto, rules: Rules) -> None:
        self.rules = rules
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self.graph = model.graph

    def run(self, inputs: Values, outputs: Sequence[str]) -> list[Fact]:
        """Facts of the outputs."""
        return self._graph(self.graph, inputs, outputs)

    def _graph(self, graph: onnx.GraphProto, outer: Values, outputs: Sequence[str]) -> list[Fact]:
        values = {**outer, "": DontCare()}
        values |= {name: Known((array,), name=name) for name, array in constants(graph).items()}
        for node in needed(graph, outputs):
            try:
                results = self._node(node, values)
            except NotAnEncoder as reason:
                raise reason if str(reason).startswith("node ") else NotAnEncoder(f"{node} {reason}") from None
            except (ValueError, IndexError, KeyError) as error:  # attributes or shapes that no valid graph has
                raise NotAnEncoder(f"{node} is not as expected: {error!r}") from error
            values |= dict(zip(node.outputs, results, strict=False))
        return [values[name] for name in outputs]

    def _node(self, node: Node, values: Values) -> Iterable[Fact]:
        missing = [name for name in node.inputs if name not in values]
        if missing:
            raise NotAnEncoder(f"reads {missing[0]!r}, which nothing defines")
        if node.op == "If":
            return self._branch(node, values)
        inputs = [values[name] if name else None for name in node.inputs]
        rule = RULES.get(node.op)
        known = all(isinstance(x, Known) for x in inputs if x is not None)
        if rule is not None:
            result = rule(self, node, inputs)
            if result is not None:
                return result if isinstance(result, tuple) else (result,)
        if known:
            return self.compute(node, {n: x for n, x in zip(node.inputs, inputs, strict=True) if isinstance(x, Known)})
        raise NotAnEncoder("the encoder dialect has no equal of this operator")

    def _branch(self, node: Node, values: Values) -> list[Fact]:
        condition = values[node.inputs[0]]
        if not isinstance(condition, Known) or not condition.fixed:
            raise NotAnEncoder("branches on what the inputs hold")
        branch = node.attrs["then_branch" if condition.values[0].all() else "else_branch"]
        return self._graph(branch, values, [value.name for value in branch.output])

    def compute(self, node: Node, inputs: dict[str, Known]) -> list[Fact]:
        """Evaluate an operator whose inputs are known: once if they are constants, else at both probes."""
        outputs = [name for name in node.outputs if name]
        ends = [[onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, outputs)]
        graph = onnx.helper.make_graph([node.proto], "one node", *ends)
        probes = (0,) if all(x.fixed for x in inputs.values()) else PROBES
        results: list[list[Array]] = []
        for probe in probes:
            try:
                feeds = {name: x.at(probe) for name, x in inputs.items()}
                with np.errstate(all="ignore"):
                    found = ReferenceEvaluator(graph, opsets=self.opsets).run(None, feeds)
            except Exception as error:  # whatever the reference raises, the operator could not be evaluated
                raise NotAnEncoder(f"could not be computed from the mask and the shapes: {error}") from error
            results.append([as_float32(np.asarray(value)) for value in found])
        found_at = dict(zip(outputs, zip(*results, strict=True), strict=True))
        return [Known.of(found_at[name]) if name else DontCare() for name in node.outputs]
