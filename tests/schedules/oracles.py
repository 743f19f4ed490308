"""NumPy definitions of the kernels, and how tests run a kernel: aligned memory, cached builds, mixed-length batches."""

from functools import cache

import numpy as np
import pytest
import tvm_ffi
from scipy import special

from whet.runtime.cpu import cpu_flags
from whet.schedules import bfloat16
from whet.schedules import isa as isas

TILE = 16
NAMES = ("avx512_vnni", "avx_vnni", "avx2")
BF16_NAMES = tuple(isas.BF16_ISAS)
MIXED = [1, 2, 3, 17, 40, 128, 5, 16, 16, 1, 31, 64, *[8] * 9, 9, 7, 100]
"""Lengths of requests: short, long, and at many alignments."""


@cache
def build(generator, spec, isa, *knobs):
    """The compiled kernel; skips the test where this machine cannot run it."""
    target = isas.isa(isa)
    missing = set(target.cpu_flags) - cpu_flags()
    if missing:
        pytest.skip(f"{isa} needs {', '.join(sorted(missing))}, which this CPU lacks")
    return isas.compile_for(generator(spec, target, *knobs), target)


def several():
    """The instruction sets of this machine; skips the test where it has but one, for none to agree with."""
    here = [name for name in NAMES if set(isas.isa(name).cpu_flags) <= cpu_flags()]
    if len(here) < 2:
        pytest.skip(f"this CPU has {', '.join(here) or 'none'} of {', '.join(NAMES)}; two are compared")
    return here


def run(kernel, inputs, outputs):
    """Calls ``kernel`` with inputs and fresh outputs, given as (shape, dtype); returns the outputs.

    Outputs start as all-ones bytes (NaN in float32), so what a kernel fails to write is seen.
    """
    results = [
        aligned(np.full(shape, -1, "int8").repeat(np.dtype(dtype).itemsize).view(dtype).reshape(shape))
        for shape, dtype in outputs
    ]
    arguments = [aligned(x) for x in inputs]
    kernel(*(tvm_ffi.from_dlpack(x) for x in (*arguments, *results)))
    for before, after in zip(inputs, arguments, strict=True):
        np.testing.assert_array_equal(before, after)
    return results


def aligned(array):
    """A copy at an address that is a multiple of 64, as kernels require."""
    memory = np.zeros(array.nbytes + 64, "uint8")
    offset = -memory.ctypes.data % 64
    copy = memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def to_tiles(rows):
    """(t, C) to (nt, C, 16); lanes past the last token are 0."""
    tokens, channels = rows.shape
    count = -(-tokens // TILE)
    padded = np.zeros((count * TILE, channels), rows.dtype)
    padded[:tokens] = rows
    return np.ascontiguousarray(padded.reshape(count, TILE, channels).transpose(0, 2, 1))


def from_tiles(tiles, tokens=None):
    """(nt, C, 16) to (t, C)."""
    return tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])[:tokens]


def to_quads(rows):
    """(t, C) to (nt, C / 4, 16, 4)."""
    tiles = to_tiles(rows)
    count, channels, _ = tiles.shape
    return np.ascontiguousarray(tiles.reshape(count, channels // 4, 4, TILE).transpose(0, 1, 3, 2))


def from_quads(quads, tokens=None):
    """(nt, C / 4, 16, 4) to (t, C)."""
    count, quarter, _, _ = quads.shape
    return quads.transpose(0, 2, 1, 3).reshape(count * TILE, quarter * 4)[:tokens]


def from_pairs(pairs, tokens=None):
    """(nt, C / 2, 16, 2), bits of bfloat16, to float32 (t, C)."""
    count, half, _, _ = pairs.shape
    return bfloat16.from_bits(pairs).transpose(0, 2, 1, 3).reshape(count * TILE, half * 2)[:tokens]


def fill_last_tile(rows):
    """What lanes past the last token hold must not matter."""
    rng = np.random.default_rng(99)
    return np.concatenate([rows, rng.integers(0, 120, (-len(rows) % 16, rows.shape[1])).astype(rows.dtype)])


def segments_of(lengths, first=0, gaps=None):
    """Segments (ng, 16, 2) of requests that follow each other from token ``first``; ``gaps`` puts unused entries in."""
    starts = first + np.cumsum([0, *lengths[:-1]])
    entries = list(zip(starts, lengths, strict=True))
    for position in sorted(gaps or (), reverse=True):
        entries.insert(position, (0, 0))
    segments = np.zeros((max(1, -(-len(entries) // TILE)), TILE, 2), "int32")
    segments.reshape(-1, 2)[: len(entries)] = entries
    return segments


def requests_of(segments):
    """(index of the entry, slice of its tokens) of every used entry."""
    entries = segments.reshape(-1, 2)
    return [(i, slice(s, s + n)) for i, (s, n) in enumerate(entries.tolist()) if n]


def check_first_tiles(segments, first_only, whole, unwritten):
    """What a kernel of first tiles made, against all; tokens × channels. Others are as before: ``unwritten``."""
    written = np.zeros(len(whole), bool)
    for _, tokens in requests_of(segments):
        written[tokens.start : min(tokens.stop, tokens.start // 16 * 16 + 16)] = True
    assert 0 < written.sum() < len(written)
    np.testing.assert_array_equal(first_only[written], whole[written])
    np.testing.assert_array_equal(first_only[~written], np.full_like(whole, unwritten)[~written])


def requant(rng, channels, inverse, zero):
    """What kernels quantise with: 1/s of each channel, around ``inverse``, and the zero point."""
    return np.append(inverse * rng.uniform(0.5, 1.5, channels), zero).astype("float32")


def quantize(y, requant):
    """Rows of float32 to uint8: round half to even, clamp."""
    return np.clip(np.rint(y * requant[:-1] + requant[-1]), 0, 255)


def token_params(y):
    """Scale and zero point of each row of (t, C), asymmetric over a range that includes 0."""
    low, high = np.minimum(y.min(1), 0), np.maximum(y.max(1), 0)
    scale = np.maximum(high - low, 1e-30) / 255
    return scale, np.clip(np.rint(-low / scale), 0, 255)


def layer_norm(rows, gamma, beta, eps):
    rows = rows.astype("float64")
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * gamma + beta


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: x * special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
}
