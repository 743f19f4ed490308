"""Move the large constants of a plain graph into parameters, so that processes can share them.

Before: a plain Relax function whose weights are constants. After: its parameters are the inputs and, after them, one
tuple of the constants of at least 1 KiB. Constants that stay are copied at load, once per process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import IRModule, relax
from tvm.ir.expr import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

SMALL = 1024


def lift_constants(module: IRModule) -> tuple[IRModule, list[tuple[str, np.ndarray[Any, Any]]]]:
    """Rewrite ``main`` as the module docstring says; returns the lifted constants in the order of the tuple."""
    function = module["main"]
    lifter = _Lifter()
    body = lifter.visit_expr(function.body)
    lifted = relax.Function([*function.params, *lifter.variables], body, function.ret_ty, function.is_pure)
    result = module.clone()
    result["main"] = lifted.with_attrs({"global_symbol": "main", "num_input": len(function.params)})
    weights = [(f"constant.{i}", array) for i, array in enumerate(lifter.arrays)]
    return relax.transform.BundleModelParams()(result), weights


@mutator
class _Lifter(PyExprMutator):  # type: ignore[misc]
    """Replaces constants by variables and remembers both."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: list[relax.Var] = []
        self.arrays: list[np.ndarray[Any, Any]] = []

    def visit_generic_const_(self, op: GenericConst) -> relax.Expr:
        array = op.value.numpy()
        if array.nbytes < SMALL:
            return op
        self.variables.append(relax.Var(f"constant_{len(self.arrays)}", op.ty))
        self.arrays.append(array)
        return self.variables[-1]
