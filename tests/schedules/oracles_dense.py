"""NumPy oracles of the dense kernels, and how the tests call a kernel."""

from functools import cache

import numpy as np
import pytest
import tvm
from scipy.special import erf

from whet.runtime.cpu import cpu_flags
from whet.schedules.dense import DenseSpec, dense
from whet.schedules.isa import ISAS, Isa, compile_for

TILE = 16


def runnable(isa):
    """A parameter for an instruction set, skipped with the reason where this CPU lacks it."""
    missing = sorted(set(isa.cpu_flags) - cpu_flags())
    return pytest.param(isa, id=isa.name, marks=pytest.mark.skipif(bool(missing), reason=f"CPU lacks {missing}"))


VECTOR_ISAS = [isa for isa in ISAS.values() if isa.name != "amx_int8"]
"""AMX differs in the dense int8 kernel alone, which has its own tests."""
EVERY_ISA = [runnable(isa) for isa in VECTOR_ISAS]
RUNNABLE = [isa for isa in VECTOR_ISAS if cpu_flags().issuperset(isa.cpu_flags)]


def aligned(array):
    """A copy that starts on a cache line, as compiled code assumes."""
    array = np.asarray(array)
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@cache
def compiled(spec: DenseSpec, isa: Isa, knobs=None):
    kernel = dense(spec, isa, knobs)
    return kernel, compile_for(kernel.func, isa)


def empty_outputs(spec, tiles):
    n = spec.out_features
    if spec.output == "tiles":
        return [np.full((tiles, n, TILE), np.nan, np.float32)]
    if spec.output == "pairs":
        return [np.zeros((tiles, n // 2, TILE, 2), np.uint16)]
    if spec.output == "quads":
        return [np.zeros((tiles, n // 4, TILE, 4), np.uint8)]
    if spec.output == "values":
        return [np.zeros((tiles, n, TILE), np.int8)]
    h = n // 3
    if spec.weight == "bf16":
        pairs = (tiles, h // 2, TILE, 2)
        return [np.zeros(shape, np.uint16) for shape in (pairs, pairs, (tiles, h, TILE))]
    quads = (tiles, h // 4, TILE, 4)
    return [np.zeros(quads, np.uint8), np.zeros(quads, np.int8), np.zeros((tiles, h, TILE), np.int8)]


GUARD = 64
"""Bytes after each output that a kernel must leave alone."""


def run(spec, isa, weight, x, rest, knobs=None):
    """Call the kernel on NumPy arrays: packed activations ``x`` and the arguments after the weight, in order."""
    kernel, module = compiled(spec, isa, knobs)
    outputs, rooms = [], []
    for out in empty_outputs(spec, len(x)):
        room = aligned(np.full(out.nbytes + GUARD, 0xA5, np.uint8))
        view = room[: out.nbytes].view(out.dtype).reshape(out.shape)
        view[...] = out
        outputs.append(view)
        rooms.append(room)
    arrays = [x, *kernel.pack(weight), *rest]
    module(*(tvm.runtime.from_dlpack(aligned(a)) for a in arrays), *(tvm.runtime.from_dlpack(o) for o in outputs))
    assert all((room[-GUARD:] == 0xA5).all() for room in rooms), "wrote past the end of an output"
    return outputs[0] if len(outputs) == 1 else outputs


def to_quads(rows, channels=4):
    """``(tiles, C, 16)`` bytes as quads ``(tiles, C/4, 16, 4)``, or with other numbers of channels together."""
    split = rows.reshape(len(rows), -1, channels, TILE)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2))


def product(weight, rows):
    """Exact ``W·x`` of each tile in int64, or float64 for floats."""
    wide = np.float64 if weight.dtype == np.float32 else np.int64
    return np.matmul(weight.astype(wide), rows.astype(wide))


def activate(kind, y):
    if kind == "gelu":
        return y * 0.5 * (1 + erf(y / np.sqrt(2)))
    if kind == "gelu_tanh":
        return y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return {"none": lambda v: v, "relu": lambda v: np.maximum(v, 0), "tanh": np.tanh}[kind](y)


def clamped(y, low, high, dtype):
    return np.clip(np.rint(y), low, high).astype(dtype)


def random_blocks(rng, n, k, rows, density, columns=4):
    """int8 ``(n, k)`` where each block of rows × columns is kept with probability ``density``."""
    weight = rng.integers(-127, 128, (n, k)).astype(np.int8)
    keep = rng.random((-(-n // rows), k // columns)) < density
    return weight * np.repeat(np.repeat(keep, rows, 0)[:n], columns, 1).astype(np.int8)
