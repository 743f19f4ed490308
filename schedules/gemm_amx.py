"""The loop nest that dense layers on AMX share: 16 output rows × 16 tokens × up to 64 bytes of channels at a time.

Quads and pairs are AMX's second operand as they lie in memory: a tile register row is a word each of 16 tokens. The
first operand is a piece of 16 weight rows, which a family brings to the tile registers in its own way (``Weights``).
A *pass* is ``Blocking.rows`` output rows, a *step* of its reduction is as many words as a tile register holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules import amx
from whet.schedules.amx import ROWS
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.epilogue import Epilogue
from whet.schedules.gemm import Block, Blocking, named, parameter
from whet.schedules.isa import TILE, Isa

WORD = 4
"""Bytes that hold a token's channels in a row."""

NEAR_BYTES = 32 << 10
"""Weights that stay in the first-level cache while activations stream past it."""

SPAN_BYTES = 768 << 10
"""Activations that stay in the second-level cache beside them, about."""

UNIT_BYTES = 144 << 10
"""Weights of a unit of parallel work, about."""


def suits(spec: DenseSpec, isa: Isa) -> bool:
    """Whether AMX computes such a layer fast: its words must split into full enough tile registers."""
    return isa.has_amx and depth_of(spec) >= ROWS // 2


def depth_of(spec: DenseSpec) -> int:
    """Words in a tile register: the most that divide the layer's, so that none is left over."""
    return max(d for d in range(1, ROWS + 1) if spec.words % d == 0)


def steps(spec: DenseSpec) -> int:
    """Tile registers that the input channels fill."""
    return spec.words // depth_of(spec)


def default_knobs(spec: DenseSpec, isa: Isa) -> Blocking:
    """Two by two accumulator tiles: each operand loaded is used twice, which the load ports just keep up with.

    After integers with an activation, two by one: the vector units, busy with it anyway, hide half as much at a time.
    A unit of parallel work costs a microsecond by itself, so it gets weights for at least 25 at 128 tokens.
    """
    rows = 2 * ROWS
    tiles = 1 if spec.is_integer and spec.activation != "none" else 2
    return Blocking(rows=rows, tiles=tiles, chains=1, chunk=max(rows, UNIT_BYTES // (spec.words * WORD)))


def generate(name: str, spec: DenseSpec, isa: Isa, knobs: Blocking, weights: Weights) -> Any:
    """Generate the kernel ``name`` whose weights come to the tile registers by way of ``weights``.

    Every cache level has its part: a *span* of tokens, whose activations stay in the second level, meets all weights
    of a task in turn; a *chunk* of a pass of weights stays in the first while all token blocks of the span meet it.
    While the tile unit multiplies one block, the vector units finish the block before it: some rows at each step.
    """
    n, rows, most, element = spec.out_features, knobs.rows, knobs.tiles, spec.element
    depth, reduction = depth_of(spec), steps(spec)
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
        T.func_name(f"{name}_{n}x{spec.in_features}")
        tiles = T.int64()
        x = parameter("x", (tiles, spec.words, TILE, element.channels), element.x)
        weights.declare(spec, Plan(passes, reduction, math.ceil(reduction / chunks), rows, depth))
        epilogue = Epilogue.declare(spec, isa, tiles)
        parts_a_step = math.ceil(rows // epilogue.together / (reduction // chunks))

        def first_step(chunk: Any) -> Any:
            return T.truncdiv(chunk * reduction, chunks)

        def steps_of(chunk: Any) -> Any:
            return first_step(chunk + 1) - first_step(chunk)

        def step(work: Work, k: Any, count: int) -> None:
            for r in range(row_tiles):
                for t in range(count):
                    if r == 0:
                        at = T.address_of(x[work.block.first_tile + t, (work.first_step + k) * depth, 0, 0])
                        amx.load(registers.token(t), at, TILE * WORD, stream=True)
                    if t == 0:
                        amx.load(registers.row(r), *weights.at(work, k, r))
                    amx.multiply_add(product, registers.sum(r, t), registers.row(r), registers.token(t))

        def multiply(work: Work, count: int, before: Block) -> None:
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
                step(work, k, count)
                weights.ahead(work, k)
                for i in range(parts_a_step):
                    part = named("part", T.Bind(k * parts_a_step + i))
                    with T.If(part < before.rows // epilogue.together), T.Then():
                        epilogue.emit_part(before, part)
            weights.rest(work)
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
                units = named("units", T.Bind(T.min(per_task, passes - task * per_task) * chunks))
                weights.begin(task * (per_task * reduction), steps_of(0))
                amx.configure(registers.shapes(depth))

                def work_at(position: Any) -> Work:
                    unit = T.Bind(T.truncdiv(position, blocks))
                    number = named("token_block", T.Bind(T.truncmod(position, blocks)))
                    index = named("pass", T.Bind(task * per_task + T.truncdiv(unit, chunks)))
                    chunk = T.Bind(T.truncmod(unit, chunks))
                    following = tirx.all(number == blocks - 1, unit < units - 1)
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
                    return Work(
                        index,
                        T.Bind(first_step(chunk)),
                        T.Bind(steps_of(chunk)),
                        number,
                        blocks,
                        T.Bind(T.if_then_else(following, steps_of(T.truncmod(chunk + 1, chunks)), 0)),
                        block,
                    )

                last = named("last", T.Bind(units * blocks - 1))
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
class Plan:
    """How the weights are divided: a pass is ``rows`` output rows, a step of the reduction a tile register deep."""

    passes: int
    steps: int
    """Of a pass."""
    chunk: int
    """Most of them in a chunk."""
    rows: int
    depth: int
    """Words of a step."""


class Weights(Protocol):
    """How weights get to the tile registers. Steps are counted over all passes."""

    def declare(self, spec: DenseSpec, plan: Plan) -> None:
        """Declare the parameters, the packed arrays."""

    def begin(self, step: Any, count: Any) -> None:
        """Emit what a unit of parallel work does before its first chunk, ``count`` steps from ``step``."""

    def at(self, work: Work, k: Any, row_tile: int) -> tuple[Any, int]:
        """Return the address of 16 rows of step k of the chunk, and the bytes from one to the next."""

    def ahead(self, work: Work, k: Any) -> None:
        """Emit what is done for the next chunk after step k of this one."""

    def rest(self, work: Work) -> None:
        """Emit what is done for it after all of them."""


@dataclass(frozen=True)
class Work:
    """A chunk of a pass of weights, and a token block."""

    index: Any
    """Of the pass."""
    first_step: Any
    """Of the reduction, where the chunk begins."""
    steps: Any
    number: Any
    """Of the token block, of ``of`` blocks."""
    of: Any
    next_steps: Any
    """Of the chunk that comes after this one, if this is its last token block, else 0."""
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
