"""From an assembled module to machine code."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx.compilation_pipeline import PIPELINE_MAP

from whet.schedules.isa import Isa

CPU = 1
"""DLPack's number of this device type."""


def generate_code(module: IRModule, isa: Isa) -> Any:
    """Compile the TIR functions of ``module`` for one instruction set; returns a TVM executable."""
    return tvm.compile(module, tvm.target.Target(isa.target), tir_pipeline="whet")


def _pipeline() -> tuple[tvm.transform.Pass, Any, Any]:
    """TVM's own pipeline, with subroutines that may allocate: it only says for entry points on which device."""
    lower, finish_host, finish_device = default_s_tir_pipeline()
    return tvm.transform.Sequential([lower, _allocate_on_cpu()]), finish_host, finish_device


def _allocate_on_cpu() -> tvm.transform.Pass:
    def allocate_on_cpu(function: tirx.PrimFunc, _module: IRModule, _context: Any) -> tirx.PrimFunc:
        if "global_symbol" in function.attrs:
            return function
        body = function.body
        for key, value in (("device_id", 0), ("device_type", CPU)):
            body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
        return function.with_body(body)

    return tirx.transform.prim_func_pass(allocate_on_cpu, opt_level=0, name="AllocateOnCpu")


PIPELINE_MAP["whet"] = _pipeline
