"""Dense layers on AMX: 16 output rows × 16 tokens × up to 64 bytes of channels, int8 or bfloat16, in one instruction.

Quads and pairs are AMX's second operand as they lie in memory: a tile register row is a word each of 16 tokens. The
first operand is a piece of 16 weight rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules import amx
from whet.schedules.amx import ROWS
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import Block, Blocking, named, parameter
from whet.schedules.isa import TILE, Isa, prefetch, view

LINE = 64
"""Bytes of a cache line."""

WORD = 4
"""Bytes that hold a token's channels in a row."""

NEAR_BYTES = 32 << 10
"""Weights that stay in the first-level cache while activations stream past it."""

SPAN_BYTES = 768 << 10
"""Activations that stay in the second-level cache beside them, about."""

UNIT_BYTES = 144 << 10
"""Weights of a unit of parallel work, about."""


def supports(spec: DenseSpec, isa: Isa) -> bool:
    """Whether this family computes the layer, and fast: the words must split into full enough tile registers."""
    weight = "bf16" if isa.dot == "bf16" else "i8"
    return isa.has_amx and spec.weight == weight and _depth(spec) >= ROWS // 2


def steps(spec: DenseSpec) -> int:
    """Tile registers that the input channels fill."""
    return spec.words // _depth(spec)


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Two by two accumulator tiles: each operand loaded is used twice, which the load ports just keep up with.

    A unit of parallel work costs a microsecond by itself, so it gets weights for at least 25 at 128 tokens.
    """
    rows = 2 * ROWS
    return Blocking(rows=rows, tiles=2, chains=1, chunk=max(rows, UNIT_BYTES // (spec.words * WORD)))


def pack(weight: NDArray[Any], spec: DenseSpec, knobs: Blocking) -> list[NDArray[Any]]:
    """``(N, K)`` to ``(passes, words / depth, rows / 16, 16, depth, channels)``: tile registers in order of use."""
    rows, depth = knobs.rows, _depth(spec)
    padded = np.zeros((math.ceil(spec.out_features / rows) * rows, spec.in_features), weight.dtype)
    padded[: spec.out_features] = weight
    split = padded.reshape(-1, rows // ROWS, ROWS, steps(spec), depth, spec.element.channels)
    return [np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4, 5))]


def kernel(spec: DenseSpec, isa: Isa, knobs: Blocking) -> Any:
    """Generate the kernel; parameters as in whet.schedules.dense, packed weight as in ``pack``.

    Every cache level has its part: a *span* of tokens, whose activations stay in the second level, meets all weights
    of a task in turn; a *chunk* of a pass of weights stays in the first while all token blocks of the span meet it.
    While the tile unit multiplies one block, the vector units finish the block before it: some rows at each step.
    """
    n, rows, most, element = spec.out_features, knobs.rows, knobs.tiles, spec.element
    depth, reduction = _depth(spec), steps(spec)
    row_tiles = rows // ROWS
    if rows % ROWS or row_tiles * most + row_tiles + most > amx.REGISTERS:
        raise ValueError(f"knobs are {rows} rows × {most} tiles; AMX has 8 tile registers of 16 rows")
    passes = math.ceil(n / rows)
    per_task = max(1, round(knobs.chunk / rows))
    tasks = math.ceil(passes / per_task)
    token_bytes = spec.words * WORD
    chunks = math.ceil(rows * token_bytes / NEAR_BYTES)
    span = most * max(1, SPAN_BYTES // (token_bytes * TILE * most))
    product = "tdpbf16ps" if spec.weight == "bf16" else "tdpbsud"
    registers = _Registers(row_tiles, most)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(f"dense_amx_{spec.weight}_{n}x{spec.in_features}")
        tiles = T.int64()
        x = parameter("x", (tiles, spec.words, TILE, element.channels), element.x)
        weight = parameter("weight", (passes, reduction, row_tiles, ROWS, depth, element.channels), element.weight)
        epilogue = Epilogue.declare(spec, isa, tiles)
        parts_a_step = math.ceil(rows // epilogue.together / (reduction // chunks))

        def step(work: _Work, k: Any, count: int) -> None:
            for r in range(row_tiles):
                for t in range(count):
                    if r == 0:
                        at = T.address_of(x[work.block.first_tile + t, k * depth, 0, 0])
                        amx.load(registers.token(t), at, TILE * WORD, stream=True)
                    if t == 0:
                        at = T.address_of(weight[work.index, k, r, 0, 0, 0])
                        amx.load(registers.row(r), at, depth * WORD)
                    amx.multiply_add(product, registers.sum(r, t), registers.row(r), registers.token(t))

        def fetch(work: _Work, k: Any) -> None:
            """Prefetch the next chunk: each token block of this one an equal part of it, so that it goes in order."""
            lines = rows * depth * WORD // LINE
            flat = view(weight, (passes * reduction * lines * LINE,), "int8")
            done = T.Bind(work.number * work.steps + k)
            begin, end = (T.Bind(T.truncdiv(p * lines, work.of)) for p in (done, done + 1))
            start = T.Bind(T.cast(work.index * reduction + work.first_step + work.steps, "int64") * (lines * LINE))
            with T.serial(end - begin) as i:
                prefetch(flat, start + (begin + i) * LINE, level=2)

        def multiply(work: _Work, count: int, before: Block) -> None:
            sums = [(registers.sum(r, t), r, t) for r in range(row_tiles) for t in range(count)]

            def at(r: int, t: int) -> Any:
                return work.block.sums.access_ptr("rw", offset=((work.block.first_sum + t) * rows + r * ROWS) * TILE)

            with T.If(work.first_step == 0):
                with T.Then():
                    for register, _, _ in sums:
                        amx.zero(register)
                if chunks > 1:
                    with T.Else():
                        for register, r, t in sums:
                            amx.load(register, at(r, t), TILE * WORD)
            with T.serial(work.steps) as k:
                fetch(work, k)
                step(work, work.first_step + k, count)
                for i in range(parts_a_step):
                    part = named("part", T.Bind(k * parts_a_step + i))
                    with T.If(part < before.rows // epilogue.together), T.Then():
                        epilogue.emit_part(before, part)
            for register, r, t in sums:
                amx.store(register, at(r, t), TILE * WORD)

        with T.sblock("root"):
            T.reads()
            T.writes()
            spans = named("spans", T.Bind((tiles + (span - 1)) // span))
            with T.parallel(spans * tasks) as position:
                # Truncated: floors, which TVM can't prove to be the same here, take seconds to compile.
                number = named("span", T.Bind(T.truncdiv(position, tasks)))
                task = named("task", T.Bind(T.cast(T.truncmod(position, tasks), "int32")))
                first_tile = named("first_tile", T.Bind(T.truncdiv(number * tiles, spans)))
                # By way of memory: TVM draws conclusions from the expression for seconds.
                held = T.alloc_buffer((1,), "int64")
                T.buffer_store(held, T.truncdiv((number + 1) * tiles, spans) - first_tile, [0])
                length = named("length", T.Bind(held[0]))
                blocks = named("blocks", T.Bind(T.cast(T.truncdiv(length + (most - 1), most), "int32")))
                sums = named("sums", T.alloc_buffer((most if chunks == 1 else span, rows, TILE), element.sums))
                amx.configure(registers.shapes(depth))

                def work_at(position: Any) -> _Work:
                    chunk = T.Bind(T.truncdiv(position, blocks))
                    number = named("token_block", T.Bind(T.truncmod(position, blocks)))
                    index = named("pass", T.Bind(task * per_task + T.truncdiv(chunk, chunks)))
                    chunk = T.Bind(T.truncmod(chunk, chunks))
                    first_step, end_step = (T.Bind(T.truncdiv(c * reduction, chunks)) for c in (chunk, chunk + 1))
                    wide = T.cast(number, "int64")
                    first, end = (T.Bind(T.truncdiv(i * length, blocks)) for i in (wide, wide + 1))
                    block = Block(
                        first_row=index * rows,
                        rows=T.min(rows, n - index * rows),
                        first_tile=T.Bind(first_tile + first),
                        tiles=T.Bind(T.cast(end - first, "int32")),
                        sums=sums,
                        first_sum=0 if chunks == 1 else number * most,
                    )
                    return _Work(index, first_step, T.Bind(end_step - first_step), number, blocks, block)

                last = named("last", T.Bind(T.min(per_task, passes - task * per_task) * chunks * blocks - 1))
                with T.serial(last + 1) as position:
                    work, before = work_at(position), work_at(T.max(position - 1, 0))
                    finished = tirx.all(position > 0, before.first_step + before.steps == reduction)
                    ready = replace(before.block, tiles=T.Bind(T.if_then_else(finished, before.block.tiles, 0)))
                    for count in range(1, most + 1):
                        with T.If(work.block.tiles == count), T.Then():
                            multiply(work, count, ready)
                epilogue.emit(work_at(last).block)
                amx.release()
    return builder.get()


@dataclass(frozen=True)
class _Work:
    """A chunk of a pass of weights, and a token block."""

    index: Any
    """Of the pass."""
    first_step: Any
    """Of the reduction, where the chunk begins."""
    steps: Any
    number: Any
    """Of the token block, of ``of`` blocks."""
    of: Any
    block: Block


@dataclass(frozen=True)
class _Registers:
    """Which tile register holds what."""

    rows: int
    tokens: int

    def sum(self, row: int, token: int) -> int:
        return row * self.tokens + token

    def row(self, row: int) -> int:
        return self.rows * self.tokens + row

    def token(self, token: int) -> int:
        return self.rows * self.tokens + self.rows + token

    def shapes(self, depth: int) -> list[tuple[int, int]]:
        """Rows and bytes per row of each register."""
        sums, rows = [(ROWS, TILE * WORD)] * (self.rows * self.tokens), [(ROWS, depth * WORD)] * self.rows
        return [*sums, *rows, *[(depth, TILE * WORD)] * self.tokens]


def _depth(spec: DenseSpec) -> int:
    """Words in a tile register: the most that divide the layer's, so that none is left over."""
    return max(d for d in range(1, ROWS + 1) if spec.words % d == 0)
