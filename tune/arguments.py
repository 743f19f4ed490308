"""Arguments to time a kernel with: random values, and weights of the density that the layer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import BLOCKS, DenseSpec, dense
from whet.schedules.dense_spec import QUAD
from whet.schedules.gemm import Blocking
from whet.schedules.isa import TILE, isa
from whet.tune.instance import Instance, Knobs

Array = NDArray[Any]

LINE = 64
"""Compiled code assumes that tensors start on a cache line."""


@dataclass(frozen=True)
class Arguments:
    """What a kernel takes, in its order. ``weights`` alone depend on the knobs, which decide how they are packed."""

    before: list[Array]
    weights: list[Array]
    after: list[Array]
    """The rest, and the outputs."""


def aligned(array: Array) -> Array:
    """Copy an array to the start of a cache line."""
    room = np.zeros(array.nbytes + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    copy: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def make_arguments(instance: Instance, knobs: Knobs, tokens: int) -> Arguments:
    """Make the arguments of a call on ``tokens`` tokens, the same for the same instance; all arrays are aligned."""
    tiles = -(-tokens // TILE)
    if isinstance(instance.spec, AttentionSpec):
        parts: tuple[list[Array], ...] = [], [], _attention(instance.spec, tiles, tokens)
    else:
        assert isinstance(knobs, Blocking)
        parts = _dense(instance, instance.spec, knobs, tiles)
    return Arguments(*([aligned(a) for a in part] for part in parts))


def _attention(spec: AttentionSpec, tiles: int, tokens: int) -> list[Array]:
    random = np.random.default_rng(0)
    channels = spec.heads * spec.head_size
    segments = np.zeros((1, TILE, 2), np.int32)
    segments[0, 0] = 0, tokens
    if spec.precision == "f32":
        qkv = random.normal(size=(tiles, 3 * channels, TILE)).astype(np.float32)
        return [qkv, segments, np.zeros((tiles, channels, TILE), np.float32)]
    quads = (tiles, channels // QUAD, TILE, QUAD)
    q = random.integers(64, 192, quads).astype(np.uint8)
    k = random.integers(-64, 65, quads).astype(np.int8)
    v = random.integers(-127, 128, (tiles, channels, TILE)).astype(np.int8)
    params = np.array([1e-4, 1.0, 128, 0], np.float32)
    return [q, k, v, segments, params, np.zeros(quads, np.uint8)]


def _dense(
    instance: Instance, spec: DenseSpec, knobs: Blocking, tiles: int
) -> tuple[list[Array], list[Array], list[Array]]:
    random = np.random.default_rng(0)
    n, k = spec.out_features, spec.in_features
    if spec.weight == "f32":
        x: Array = random.normal(size=(tiles, k, TILE)).astype(np.float32)
        weight: Array = random.normal(size=(n, k)).astype(np.float32)
    else:
        x = random.integers(0, 256, (tiles, k // QUAD, TILE, QUAD)).astype(np.uint8)
        weight = random.integers(-127, 128, (n, k)).astype(np.int8)
    if spec.weight in BLOCKS:
        keep = random.random((-(-n // spec.block_rows), k // spec.block_columns)) < instance.density
        weight *= np.repeat(np.repeat(keep, spec.block_rows, 0)[:n], spec.block_columns, 1).astype(np.int8)
    after = [] if spec.weight == "f32" else [np.full(n, 1e-5, np.float32)]
    after.append(random.normal(size=n).astype(np.float32))
    if spec.per_token:
        after += [np.zeros(n, np.float32), np.full((tiles, 2, TILE), 1.0, np.float32)]
    if spec.residual:
        after.append(random.normal(size=(tiles, n, TILE)).astype(np.float32))
    if spec.output == "quads":
        after.append(np.array([30] * n + [128], np.float32))
    packed = dense(spec, isa(instance.isa), knobs).pack(weight)
    return [x], packed, [*after, *_outputs(spec, tiles)]


def _outputs(spec: DenseSpec, tiles: int) -> list[Array]:
    n = spec.out_features
    if spec.output == "tiles":
        return [np.zeros((tiles, n, TILE), np.float32)]
    if spec.output == "quads":
        return [np.zeros((tiles, n // QUAD, TILE, QUAD), np.uint8)]
    h = n // 3
    quads = (tiles, h // QUAD, TILE, QUAD)
    return [np.zeros(quads, np.uint8), np.zeros(quads, np.int8), np.zeros((tiles, h, TILE), np.int8)]
