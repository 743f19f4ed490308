"""What a dense layer costs, estimated, to choose between dense and block-sparse kernels layer by layer.

A kernel is modelled by what it issues: multiply-adds, loads of activations and weights, a start-up per pass over the
reduction, unpacks, and the epilogue's vectors. The constants were fitted (non-negative least squares on relative
errors) to 285 timings per instruction set on an Emerald Rapids Xeon: layers of 768 × 768, 384 × 1536 and 768 × 3072,
16 to 384 tokens, 10 %, 20 % and 40 % of the blocks of every shape and dense, weights in the last-level cache. From 64
tokens on the medians per shape are within 8 %, the worst timings 0.7 and 1.4 times the estimate; a single tile, which
waits for its weights, may take a third more. A cycle is 0.37 ns of that CPU; use only ratios elsewhere. Those of
``paired_i8`` were fitted to 90 such timings on a Zen 3, in cycles (0.33 ns) that make the estimates of AVX2's other
kernel, for 4 × 1 blocks, true there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from whet.schedules import amx, dense_amx, expanded_amx, gemm_amx, paired_i8, sparse_channel_i8, sparse_low_i8
from whet.schedules.dense import family_of
from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.gemm import Blocking
from whet.schedules.isa import TILE, Isa


@dataclass(frozen=True)
class _Cycles:
    """Cycles of each thing a vector kernel issues."""

    multiply: float
    load: float
    far_load: float
    """On top of ``load``, for an activation when a tile block's activations exceed ``NEAR_BYTES``."""
    start: float
    """Of a pass: mispredicted loop end, empty and drained accumulators."""
    vector: float
    """Of the epilogue, without activation."""
    unpack: float
    """Of bringing channels together, per unpack of one vector."""


NEAR_BYTES = 36 << 10
"""Activations that stay in the first-level cache beside the weights."""

_VECTOR = {
    "amx_int8": _Cycles(0.174, 0.357, 0.035, 24, 7.3, 0.55),
    "avx512_vnni": _Cycles(0.174, 0.357, 0.035, 24, 7.3, 0.55),
    "avx_vnni": _Cycles(0.505, 0.117, 0.526, 10, 2.2, 0.35),
    "avx2": _Cycles(1.61, 0.376, 0, 9.3, 4.6, 0.27),
}
_PAIRED = _Cycles(0.64, 0.43, 0, 29, 0.22, 0)
_FMA = {"avx2": _Cycles(0.505, 0.117, 0.526, 10, 2.2, 0.35)}  # as VNNI where there is VNNI

AMX_MULTIPLY, AMX_VECTOR, AMX_EXPAND, AMX_BYTES = 18.6, 4.7, 1.0, 7.8
"""Cycles of one tile multiplication with its share of loads, of an epilogue vector and of a row of a tile register that
is expanded; weight bytes per cycle.

Weights come from the last-level cache and hardly overlap: both wait for the same line fill buffers."""

ACTIVATION = {"none": 0.0, "relu": 0.5, "gelu": 5.0, "gelu_tanh": 5.0, "tanh": 20.0}
"""Cycles per vector of a result that is rounded to 8 bits."""


def estimate_cycles(spec: DenseSpec, tiles: int, density: float, isa: Isa) -> float:
    """Estimate one call on ``tiles`` tiles of 16 tokens, on one core.

    ``density`` is the part of the blocks that hold a non-zero; kernels of dense weights ignore it. ValueError if it is
    not within 0…1 or ``tiles`` is not positive.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; expected the part of the blocks that are kept, 0 to 1")
    if tiles < 1:
        raise ValueError(f"tiles is {tiles}; expected at least 1")
    vectors = spec.out_features * tiles * isa.parts
    activation = vectors * ACTIVATION[spec.activation]
    if family_of(spec, isa) in (dense_amx, expanded_amx):
        products = math.ceil(spec.out_features / amx.ROWS) * gemm_amx.steps(spec) * tiles
        stored: float = spec.out_features * spec.in_features
        expansion = 0.0
        if spec.weight == "i8_expanded":
            expansion = stored / amx.ROW_BYTES * AMX_EXPAND
            stored = stored * density + expanded_amx.mask_bytes(spec)
        return products * AMX_MULTIPLY + stored / AMX_BYTES + expansion + vectors * AMX_VECTOR + activation
    return _vector_kernel(spec, tiles, density, isa) + activation


def _vector_kernel(spec: DenseSpec, tiles: int, density: float, isa: Isa) -> float:
    float_ = spec.weight == "f32"
    family = family_of(spec, isa)
    cycles = _PAIRED if family is paired_i8 else (_FMA if float_ else {}).get(isa.name, _VECTOR[isa.name])
    knobs: Blocking = family.default_knobs(spec, isa)
    depth = spec.in_features if float_ else spec.in_features // QUAD
    kept = density if spec.weight == "i8_sparse" else 1.0
    blocks = math.ceil(tiles / knobs.tiles)
    passes = math.ceil(spec.out_features / knobs.rows)
    steps = passes * depth * kept
    vectors = tiles * isa.parts
    load = cycles.load
    lists, parts_of_depth, unpacks = 1, 1, 0.0
    if family is sparse_low_i8:
        lists, parts_of_depth = knobs.rows // spec.block_rows, math.ceil(depth / sparse_low_i8.K_BLOCK)
    elif family is sparse_channel_i8:
        # The first copy takes three unpacks per vector, every step three for one vector and two each for several.
        columns = min(tiles, knobs.tiles) * isa.parts
        unpacks = vectors * (depth * 3 + steps * (3 if columns == 1 else 2))
    elif min(tiles, knobs.tiles) * depth * TILE * 4 > NEAR_BYTES:
        load += cycles.far_load
    return (
        steps * knobs.rows * vectors * cycles.multiply
        + steps * lists * vectors * load
        + steps * blocks * (knobs.rows + lists) * cycles.load
        + passes * parts_of_depth * blocks * cycles.start
        + spec.out_features * vectors * cycles.vector
        + unpacks * cycles.unpack
    )
