"""Times each kernel of a model, and counts what it computes and reads: for its distance from what the machine can do.

    python benchmarks/floors.py MODEL CPU TOKENS [TOKENS …]     # one JSON object, by number of tokens

Runs the lowered module call by call, by TVM's virtual machine; the module that users get has no calls to time between.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from whet.compiler import import_model
from whet.host import host_isa
from whet.passes.dialect import TILE
from whet.passes.lower import Lowered
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.progress import Silent
from whet.runtime.cpu import request_amx
from whet.schedules.isa import Isa

WARM_UPS, LEAST_RUNS, SECONDS = 3, 20, 1.5
CALIBRATION = 8
DENSE = re.compile(r"dense_(?P<weight>f32|i8)(?:_expanded_\d+x\d+)?_(?P<rows>\d+)x(?P<columns>\d+)_")
SPARSE = re.compile(r"dense_i8_sparse_(?P<block>\d+x\d+)_(?P<rows>\d+)x(?P<columns>\d+)_")


@dataclass
class Op:
    """All calls of one kernel in one run of the model."""

    name: str
    calls: int = 0
    ms: float = 0.0
    multiply_adds: float = 0.0
    """That are executed: a sparse kernel's are those of the blocks it keeps."""
    unit: str = "none"
    """What bounds its arithmetic: "int8", "int8 sparse" (no tiles of AMX there), "fp32" or "none"."""
    weight_bytes: float = 0.0
    value_bytes: float = 0.0
    """Activations read and written."""


def main() -> None:
    """Print the ops of a model for each number of tokens."""
    folder, cpu, *tokens = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu)})
    os.environ["TVM_NUM_THREADS"] = "1"
    isa = host_isa()
    if "amx" in isa.name:
        request_amx()
    lowered, length = lower(Path(folder), isa)
    executable = relax.build(lowered.module, tvm.target.Target(isa.target))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = tvm_ffi.convert([aligned(array) for _, array in lowered.weights])
    found = {}
    for count in map(int, tokens):
        if count > length:
            raise ValueError(f"{count} tokens; the model takes {length}")
        ops = counted(lowered, count)
        for name, seconds in timed(machine, requests(count), weights, set(ops)).items():
            ops[name].ms = seconds * 1e3
        found[count] = [asdict(op) for op in sorted(ops.values(), key=lambda op: -op.ms)]
    print(json.dumps(found))


def lower(folder: Path, isa: Isa) -> tuple[Lowered, int]:
    """The kernels of the int8 module, and the longest request."""
    model = import_model(folder)
    random = np.random.default_rng(0)
    ids = [random.integers(0, model.vocab_size, 64) for _ in range(CALIBRATION)]
    options = Options(isas=(isa,), max_length=model.max_length, quantisation=QuantisationConfig())
    (compiled,) = run_pipeline(model.module, options, ids, [np.zeros_like(i) for i in ids], Silent())
    return compiled.lowered, model.max_length


def requests(count: int) -> list[Any]:
    """One request of so many tokens, packed."""
    tokens = -(-count // TILE) * TILE
    ids, positions = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    ids[:count] = np.random.default_rng(0).integers(1000, 2000, count)
    positions[:count] = np.arange(count)
    segments = np.zeros((1, TILE, 2), np.int32)
    segments[0, 0] = 0, count
    packed = [a.reshape(-1, TILE) for a in (ids, positions, np.zeros_like(ids))]
    return [aligned(a) for a in (*packed, segments)]


def aligned(array: np.ndarray[Any, Any]) -> Any:
    """A copy at a multiple of 64 bytes, as compiled code expects it."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def timed(machine: Any, inputs: list[Any], weights: Any, kernels: set[str]) -> dict[str, float]:
    """Seconds of each of ``kernels`` in one run: the sum over its calls of the median over runs."""
    times: dict[str, list[float]] = defaultdict(list)
    started = 0.0

    def instrument(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
        nonlocal started
        if before:
            started = time.perf_counter()
        else:
            times[name].append(time.perf_counter() - started)
        return 0  # run it

    run = machine["main"]
    machine.set_instrument(instrument)
    for _ in range(WARM_UPS):
        run(*inputs, weights)
    times.clear()
    start, runs = time.perf_counter(), 0
    while runs < LEAST_RUNS or time.perf_counter() - start < SECONDS:
        run(*inputs, weights)
        runs += 1
    return {name: float(np.median(np.array(times[name]).reshape(runs, -1), axis=0).sum()) for name in kernels}


def counted(lowered: Lowered, count: int) -> dict[str, Op]:
    """What each kernel computes and reads in one run."""
    main = lowered.module["main"]
    *inputs, weights = main.params
    sizes = {inputs[0].ty.shape[0]: -(-count // TILE), inputs[3].ty.shape[0]: 1}
    ops: dict[str, Op] = {}
    bindings = [b for block in main.body.blocks for b in block.bindings]
    items = {
        b.var: int(b.value.index)
        for b in bindings
        if isinstance(b.value, relax.TupleGetItem) and b.value.tuple_value.same_as(weights)
    }
    for binding in bindings:
        call = binding.value
        if not (isinstance(call, relax.Call) and call.op.name == "relax.call_tir"):
            continue
        name = call.args[0].name_hint
        op = ops.setdefault(name, Op(name))
        op.calls += 1
        constants = [lowered.weights[items[a]][1] for a in call.args[1].fields if a in items]
        values = sum(size(a.ty, sizes) for a in call.args[1].fields if a not in items) + size(binding.var.ty, sizes)
        op.value_bytes += values
        if not name.startswith("embed"):  # it looks rows up
            op.weight_bytes += sum(c.nbytes for c in constants)
        op.unit, per_call = arithmetic(name, call, constants, count)
        op.multiply_adds += per_call
    return ops


def arithmetic(name: str, call: Any, constants: list[np.ndarray[Any, Any]], count: int) -> tuple[str, float]:
    """What bounds a call's arithmetic, and its multiply-adds."""
    if match := SPARSE.match(name):
        # Of the packed arrays, the int8 one holds the blocks.
        kept = max(c.size for c in constants if c.dtype == np.int8)
        return "int8 sparse", float(kept * count)
    if match := DENSE.match(name):
        return ("fp32" if match["weight"] == "f32" else "int8"), float(match["rows"]) * float(match["columns"]) * count
    if name.startswith("attention"):
        first = call.args[1].fields[0].ty
        integer = str(first.dtype) != "float32"
        channels = int(first.shape[1]) * 4 if integer else int(first.shape[1]) // 3
        return ("int8" if integer else "fp32"), 2.0 * channels * count * count
    return "none", 0.0


def size(ty: Any, sizes: Mapping[Any, int]) -> float:
    """Bytes of a tensor or of a tuple of them."""
    if isinstance(ty, relax.TupleType):
        return sum(size(part, sizes) for part in ty.fields)
    elements = np.prod([float(sizes[d]) if d in sizes else float(int(d)) for d in ty.shape])
    return float(elements) * np.dtype(str(ty.dtype)).itemsize


if __name__ == "__main__":
    main()
