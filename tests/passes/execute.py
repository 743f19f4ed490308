"""Builds a lowered module and runs it on requests, for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm_ffi

from whet.codegen import generate_code
from whet.link import Blob
from whet.passes.assemble import assemble
from whet.passes.dialect import TILE
from whet.passes.lower import Lowered
from whet.schedules.isa import Isa

Program = Callable[..., np.ndarray]


def aligned(array: np.ndarray) -> tvm_ffi.Tensor:
    """A 64-byte aligned copy as a tensor: compiled code loads whole cache lines."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def run(lowered: Lowered, isa: Isa, requests: list[np.ndarray], per_request: bool) -> np.ndarray:
    """Compile, pack the requests, run; rows per request or per token."""
    return program(lowered, isa)(requests, per_request)


def program(lowered: Lowered, isa: Isa) -> Program:
    """Compile once; what it returns packs requests and runs them, as often as it is called.

    Further arguments of that are the records of a module that takes some, int64 ``(requests, 2)``, none if None; and
    what replaces weights, by the start of their names.
    """
    weights = Blob()
    table = {name: weights.add(name, array) for name, array in lowered.weights}
    assembled = assemble(lowered.module, [weight.offset for weight in table.values()])
    original = np.frombuffer(b"".join(weights.pieces()), np.uint8)
    executable = generate_code(assembled.module, isa)
    channels = int(lowered.module["main"].ret_ty.shape[1])
    takes_records = int(lowered.module["main"].attrs["num_input"]) == 5

    def answer(
        requests: list[np.ndarray], per_request: bool, records: object = None, **changed: np.ndarray
    ) -> np.ndarray:
        inputs = pack(requests)
        if takes_records:
            addresses = np.zeros(inputs[3].shape, np.int64)
            if records is not None:
                addresses.reshape(-1, 2)[: len(requests)] = records
            inputs.append(aligned(addresses))
        blob = original.copy()
        for start, array in changed.items():
            (offset,) = {w.offset for name, w in table.items() if name.startswith(start)}
            blob[offset : offset + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        tiles, groups = inputs[0].shape[0], inputs[3].shape[0]
        size = tiles * assembled.workspace.per_tile + groups * assembled.workspace.per_group
        workspace = np.full(size + 1, 0xA5, np.uint8)  # what is read before it is written shows
        out = aligned(np.zeros((groups if per_request else tiles, channels, TILE), np.float32))
        executable["main"](*inputs, aligned(blob), aligned(workspace), out)
        output = out.numpy()
        count = len(requests) if per_request else sum(map(len, requests))
        return output.transpose(0, 2, 1).reshape(-1, output.shape[1])[:count]

    return answer


def pack(requests: list[np.ndarray]) -> list[tvm_ffi.Tensor]:
    """Token ids, positions, token types (all 0) and segments of requests that stand one after the other."""
    starts = np.cumsum([0, *map(len, requests)])
    tokens = -(-int(starts[-1]) // TILE) * TILE
    ids, positions = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    segments = np.zeros((-(-len(requests) // TILE) * TILE, 2), np.int32)
    for i, request in enumerate(requests):
        ids[starts[i] : starts[i + 1]] = request
        positions[starts[i] : starts[i + 1]] = np.arange(len(request))
        segments[i] = starts[i], len(request)
    shaped = [a.reshape(-1, TILE) for a in (ids, positions, np.zeros_like(ids))]
    return [aligned(a) for a in (*shaped, segments.reshape(-1, TILE, 2))]
