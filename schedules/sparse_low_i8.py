"""Block-sparse int8 layers whose blocks are lower than a quad of rows: 1 × 4 and 2 × 4.

Such a block gives few multiply-adds per activation it loads, and so few per row that the end of a row's reduction
costs as much as the row. Hence several rows, or pairs of rows, are reduced in one loop, each with a list of blocks of
its own: the chosen ones have about as many blocks, whichever rows of a chunk they are, the shorter lists end in zeros.
Wide inputs are reduced in K blocks whose activations stay in the first-level cache; the sums wait in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import QUAD, DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import (
    PREFETCH_BYTES,
    Accumulators,
    Block,
    Blocking,
    chunk_count,
    multiply_add,
    named,
    parameter,
    tile_blocks,
    tile_offset,
    tiles_of_block,
    vector_at,
)
from whet.schedules.isa import TILE, Isa, prefetch, splat, view

K_BLOCK = 192
"""Most quads that are reduced at a time: for four tiles 48 KiB of activations, and an index is a byte."""

SPLITS = 2
"""Most accumulator sets that a list is divided over; the length of a list is a multiple of it."""


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Return the register blocking that measured best; ``rows / block_rows`` lists are reduced together."""
    if isa.lanes == TILE:
        return Blocking(rows=4, tiles=4, chains=8, chunk=64)
    return Blocking(rows=2, tiles=2, chains=8, chunk=64)


@dataclass(frozen=True)
class _Plan:
    """How the rows and the input channels are divided. A unit is ``block_rows`` rows, a pass is ``lists`` units."""

    lists: int
    passes: int
    """In all, per K block."""
    chunks: int
    depth: int
    """Quads of a K block, perhaps fewer in the last one."""
    depths: int
    """K blocks."""
    align: int
    """Passes that a chunk has a multiple of: whole quads of rows."""

    @staticmethod
    def of(spec: DenseSpec, knobs: Blocking) -> _Plan:
        if knobs.rows % spec.block_rows:
            raise ValueError(f"knobs.rows is {knobs.rows}; expected a multiple of block_rows, {spec.block_rows}")
        align = math.lcm(knobs.rows, QUAD) // knobs.rows
        passes = math.ceil(spec.out_features / (knobs.rows * align)) * align
        quads = spec.in_features // QUAD
        depths = math.ceil(quads / K_BLOCK)
        chunks = min(chunk_count(knobs, spec.out_features), passes // align)
        return _Plan(knobs.rows // spec.block_rows, passes, chunks, math.ceil(quads / depths), depths, align)

    def bound(self, chunk: Any) -> Any:
        """First pass of a chunk, an int or a TIR expression."""
        return chunk * (self.passes // self.align) // self.chunks * self.align

    @property
    def most(self) -> int:
        """Passes of the largest chunk."""
        return max(int(self.bound(c + 1) - self.bound(c)) for c in range(self.chunks))


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to four arrays: units, indptr, index, blocks.

    The passes stand in the order chunk, K block, number of blocks. Pass p reduces the units ``units[p]`` (int32
    ``(…, lists)``, counted within the chunk); its lists, of the same length, lie one after the other from
    ``indptr[p]`` to ``indptr[p + 1]`` (int32): ``index`` (uint8) is a block's quad within the K block, ``blocks``
    s8 ``(…, block_rows, 4)``.
    """
    plan, height = _Plan.of(spec, knobs), spec.block_rows
    padded = np.zeros((plan.passes * knobs.rows, plan.depths * plan.depth * QUAD), np.int8)
    padded[: spec.out_features, : spec.in_features] = weight
    # units, K blocks, quads of one, rows, 4
    blocks = padded.reshape(-1, height, plan.depths, plan.depth, QUAD).transpose(0, 2, 3, 1, 4)
    present: NDArray[Any] = np.asarray(blocks.any(axis=(3, 4)))
    units, lengths, index, values = [], [], [], []
    for chunk in range(plan.chunks):
        first, last = plan.bound(chunk) * plan.lists, plan.bound(chunk + 1) * plan.lists
        for depth in range(plan.depths):
            here = present[first:last, depth]
            counts = here.sum(1)
            passes = np.argsort(counts, kind="stable").reshape(-1, plan.lists)
            longest = counts[passes].max(1)
            longest += -longest % SPLITS
            units.append(passes)
            lengths.append(longest)
            for members, length in zip(passes, longest, strict=True):
                quads, kept = np.zeros((plan.lists, length), np.uint8), np.arange(length) < counts[members][:, None]
                of_list, quads[kept] = np.nonzero(here[members])
                lists = np.zeros((plan.lists, length, height, QUAD), np.int8)
                lists[kept] = blocks[first + members[of_list], depth, quads[kept]]
                index.append(quads.reshape(-1))
                values.append(lists.reshape(-1, height, QUAD))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) * plan.lists
    if not indptr[-1]:  # no array is empty, not even for a weight of zeros
        index, values = [np.zeros(1, np.uint8)], [np.zeros((1, height, QUAD), np.int8)]
    return [
        np.concatenate(units).astype(np.int32),
        indptr.astype(np.int32),
        np.concatenate(index),
        np.concatenate(values),
    ]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``."""
    n, quads, height, rows = spec.out_features, spec.in_features // QUAD, spec.block_rows, knobs.rows
    plan = _Plan.of(spec, knobs)
    passes = plan.passes * plan.depths
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"sparse_i8_{height}x4_{n}x{spec.in_features}")
        tiles, stored = T.int64(), T.int64()
        x = parameter("x", (tiles, quads, TILE, QUAD), "uint8")
        units = parameter("units", (passes, plan.lists), "int32")
        indptr = parameter("indptr", (passes + 1,), "int32")
        index = parameter("index", (stored,), "uint8")
        weight = parameter("weight", (stored, height, QUAD), "int8")
        epilogue = Epilogue.declare(spec, isa, tiles)
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = named("flat", view(x, (tile_offset(quads, tiles),), "int32"))
            words = named("weight_words", view(weight, (stored, height), "int32"))

            def multiply_block(registers: Accumulators, base: Any, position: Any) -> None:
                at = named("block", T.Bind(position))
                quad = named("quad", T.Bind(T.cast(index[at], "int64")))
                multiply_add(
                    registers,
                    height,
                    lambda column: vector_at(flat, base + quad * TILE, column, quads * TILE, isa),
                    lambda row: splat(words[at, row], isa.lanes),
                    isa.dot4,
                )

            def reduce(position: Any, base: Any, size: int, sums: Any) -> None:
                begin = named("block_begin", T.Bind(T.cast(indptr[position], "int64")))
                stored_here = T.cast(indptr[position + 1], "int64") - begin
                length = named("length", T.Bind(T.truncdiv(stored_here, T.int64(plan.lists))))
                lists = [T.Bind(begin + length * member) for member in range(plan.lists)]
                first_rows = [T.Bind(units[position, member] * height) for member in range(plan.lists)]
                columns = size * isa.parts
                splits = max(1, min(SPLITS, knobs.chains // (rows * columns)))
                sets = [[[isa.register("int32") for _ in range(columns)] for _ in range(rows)] for _ in range(splits)]

                def place(row: int, column: int) -> tuple[Any, ...]:
                    tile, part = divmod(column, isa.parts)
                    member, within = divmod(row, height)
                    return tile, first_rows[member] + within, T.ramp(part * isa.lanes, 1, isa.lanes)

                every = [(row, column) for row in range(rows) for column in range(columns)]
                zero = splat(0, isa.lanes, "int32")
                for s, registers in enumerate(sets):
                    for row, column in every:
                        start = sums[place(row, column)] if plan.depths > 1 and s == 0 else zero
                        T.buffer_store(registers[row][column], start, [0])
                with T.serial(T.truncdiv(length, T.int64(splits))) as j:
                    step = j * splits
                    prefetch(words, begin + step * plan.lists + PREFETCH_BYTES // (height * QUAD), 0)
                    for s, registers in enumerate(sets):
                        for member, start in enumerate(lists):
                            rows_of_list = registers[member * height : (member + 1) * height]
                            multiply_block(rows_of_list, base, start + (step + s))
                for row, column in every:
                    total = sets[0][row][column][0]
                    for registers in sets[1:]:
                        total = total + registers[row][column][0]
                    T.buffer_store(sums, total, place(row, column))

            blocks = tile_blocks(knobs, tiles)
            with T.parallel(blocks * plan.chunks) as p:
                b = named("tile_block", T.Bind(p // plan.chunks))
                chunk = named("chunk", T.Bind(T.cast(p % plan.chunks, "int32")))
                first_tile, count = tiles_of_block(b, tiles, blocks)
                sums = named("sums", T.alloc_buffer((knobs.tiles, plan.most * rows, TILE), "int32"))
                begin = named("begin", T.Bind(plan.bound(chunk)))
                end = named("end", T.Bind(plan.bound(chunk + 1)))
                if plan.depths > 1:
                    with T.grid(count, (end - begin) * rows, isa.parts) as (t, row, part):
                        lanes = T.ramp(part * isa.lanes, 1, isa.lanes)
                        T.buffer_store(sums, splat(0, isa.lanes, "int32"), [t, row, lanes])
                with T.serial(plan.depths) as depth:
                    position = named("position", T.Bind(begin * plan.depths + depth * (end - begin)))
                    offset = T.cast(depth, "int64") * (plan.depth * TILE)
                    base = named("base", T.Bind(tile_offset(quads, first_tile) + offset))
                    for size in range(1, knobs.tiles + 1):
                        with T.If(count == size), T.Then(), T.serial(end - begin) as i:
                            reduce(position + i, base, size, sums)
                first_row = begin * rows
                epilogue.emit(Block(first_row, T.min(end * rows, n) - first_row, first_tile, count, sums))
    return builder.get()
