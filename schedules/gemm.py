"""The loop nest that all dense kernels share: a block of accumulators stays in registers over the whole reduction.

Tokens are the vector lanes, so one vector of activations times one broadcast weight adds to 16 tokens of one output
row. A *pass* computes ``rows`` output rows × ``tiles`` tiles at once. Passes are gathered into *groups*, the rows
that the epilogue takes over together (four rows make a quad), and groups into chunks that run in parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.dense_spec import QUAD
from whet.schedules.isa import TILE, Isa, splat


@dataclass(frozen=True)
class Blocking:
    """How a kernel uses the registers."""

    rows: int
    """Output rows whose accumulators are live at once."""
    tiles: int
    """Most tiles of 16 tokens handled at once."""
    chains: int
    """Accumulators wanted in flight to hide the latency of the multiply-add: with fewer, the reduction is split."""
    chunk: int
    """Output rows that are one unit of parallel work, about."""

    def __post_init__(self) -> None:
        for name in ("rows", "tiles", "chains", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


PREFETCH_BYTES = 2048
"""How far ahead of their use weights are prefetched."""

Accumulators = list[list[Any]]
"""``[row][column]`` one-vector variables; columns are ``tile * isa.parts + part``."""


@dataclass(frozen=True)
class Order:
    """The order in which groups are computed, where it is not ascending. Both map TIR expressions."""

    bound: Callable[[Any], Any]
    """From a chunk to the first position it computes."""
    group: Callable[[Any], Any]
    """From a position to the group that is computed there."""


@dataclass(frozen=True)
class Pass:
    """One reduction: what the family's ``reduce`` gets to know."""

    position: Any
    """Position of the group in the order of computation (TIR expression)."""
    index: int
    """Number of this pass within its group."""
    rows: int
    """Rows that exist; fewer than ``Blocking.rows`` only at the end of the matrix."""
    tile_block: Any
    """Number of the tile block, of those that ``tile_blocks`` counts."""
    first_tile: Any
    tiles: int


@dataclass(frozen=True)
class Block:
    """Finished sums: what the epilogue gets to know. All but ``sums`` may be TIR expressions."""

    first_row: Any
    rows: Any
    first_tile: Any
    tiles: Any
    sums: Any
    """Buffer ``(…, rows, 16)`` of int32 or float32."""
    first_sum: Any = 0
    """Where in it the first tile's are."""


def named(name: str, value: Any) -> Any:
    """Give a buffer or variable its name in the printed kernel."""
    IRBuilder.name(name, value)
    return value


def parameter(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """Declare the next parameter of the kernel under construction."""
    return named(name, T.match_buffer(T.arg(name, T.handle()), shape, dtype))


def chunk_count(blocking: Blocking, out_features: int) -> int:
    """Units of parallel work that the output rows are divided into."""
    return max(1, round(out_features / blocking.chunk))


def accumulate(
    isa: Isa,
    blocking: Blocking,
    work: Pass,
    accumulators: Accumulators,
    length: Any,
    step: Callable[[Any, int, Accumulators], None],
    ahead: Callable[[Any], None],
    dtype: str,
    multiple: int = 1,
) -> None:
    """Run ``step(j, rows, accumulators)`` for j in 0…length; few chains are split over several accumulator sets.

    ``ahead(j)`` prefetches the weights that are read well after step j: from the last-level cache, the hardware's own
    prefetching reached a third of that speed. ``accumulators`` are set, not added to. A ``length`` that is an
    expression is a multiple of ``multiple``.
    """
    columns = work.tiles * isa.parts
    # Sums of floats are split as the most tiles are, so that a token's sum never depends on how many tiles there are.
    chains_of_one = work.rows * isa.parts * (blocking.tiles if dtype == "float32" else work.tiles)
    splits = max(1, min(4, blocking.chains // chains_of_one))
    if not isinstance(length, int):
        splits = math.gcd(splits, multiple)
    zero = splat(0.0 if dtype == "float32" else 0, isa.lanes, dtype)
    sets = [accumulators]
    for _ in range(splits - 1):
        sets.append([[isa.register(dtype) for _ in range(columns)] for _ in range(work.rows)])
    for registers in sets:
        for register in (r for row in registers for r in row):
            T.buffer_store(register, zero, [0])
    whole = length // splits
    with T.serial(whole) as j:
        ahead(j * splits)
        for s, registers in enumerate(sets):
            step(j * splits + s, work.rows, registers)
    if isinstance(length, int):
        for j in range(whole * splits, length):
            step(j, work.rows, accumulators)
    for registers in sets[1:]:
        for row, extra in zip(accumulators, registers, strict=True):
            for register, other in zip(row, extra, strict=True):
                T.buffer_store(register, register[0] + other[0], [0])


def multiply_add(
    registers: Accumulators,
    count: int,
    x: Callable[[int], Any],
    weight: Callable[[int], Any],
    product: Callable[[Any, Any, Any], Any],
) -> None:
    """Add one step of the reduction: ``x(column)`` vectors times the broadcast ``weight(row)`` of ``count`` rows."""
    columns = [T.Bind(x(c)) for c in range(len(registers[0]))]
    for row in range(count):
        w = T.Bind(weight(row))
        for register, column in zip(registers[row], columns, strict=True):
            T.buffer_store(register, product(register[0], column, w), [0])


def group_rows(out_features: int, rows: int) -> int:
    """Rows that the epilogue takes over together: whole passes, and whole quads where the layer has whole quads."""
    return rows if out_features % QUAD else math.lcm(rows, QUAD)


def tile_blocks(blocking: Blocking, tiles: Any) -> Any:
    """Bind the number of blocks that the tiles are divided into; within one, the activations stay in cache."""
    return named("blocks", T.Bind((tiles + (blocking.tiles - 1)) // blocking.tiles))


def tiles_of_block(block: Any, tiles: Any, blocks: Any) -> tuple[Any, Any]:
    """Bind first tile and number of tiles of a block; they differ by at most one: none is left with few chains."""
    first = named("first_tile", T.Bind(block * tiles // blocks))
    return first, named("tile_count", T.Bind(T.cast((block + 1) * tiles // blocks - first, "int32")))


def loop_nest(
    isa: Isa,
    blocking: Blocking,
    tiles: Any,
    out_features: int,
    dtype: str,
    reduce: Callable[[Pass, Accumulators], None],
    finish: Callable[[Block], None],
    order: Order | None = None,
    block_rows: int = 1,
) -> None:
    """Emit all loops; ``tiles`` is the symbolic number of tiles.

    A group is ``group_rows(out_features, lcm(blocking.rows, block_rows))`` rows; one with fewer, at the end of the
    matrix, always comes last. ``reduce`` fills the accumulators of one pass, ``finish`` stores the results of one
    group. The code of the epilogue exists once, whatever the number of tiles: activations are long.
    """
    rows = blocking.rows
    in_group = group_rows(out_features, math.lcm(rows, block_rows))
    groups, rest = divmod(out_features, in_group)
    chunks = chunk_count(blocking, out_features)
    order = order or Order(bound=lambda c: c * groups // chunks, group=lambda position: position)
    most = blocking.tiles

    def reduced(work: Pass, sums: Any) -> None:
        registers = [[isa.register(dtype) for _ in range(work.tiles * isa.parts)] for _ in range(work.rows)]
        reduce(work, registers)
        for row, of_row in enumerate(registers):
            for column, register in enumerate(of_row):
                tile, part = divmod(column, isa.parts)
                lanes = T.ramp(part * isa.lanes, 1, isa.lanes)
                T.buffer_store(sums, register[0], [tile, work.index * rows + row, lanes])

    def group(position: Any, g: Any, valid: int, b: Any, first: Any, count: Any, sums: Any) -> None:
        for size in range(1, most + 1):
            with T.If(count == size), T.Then():
                for index in range(-(-valid // rows)):
                    reduced(Pass(position, index, min(rows, valid - index * rows), b, first, size), sums)
        finish(Block(g * in_group, valid, first, count, sums))

    blocks = tile_blocks(blocking, tiles)
    with T.parallel(blocks * chunks) as p, isa.definitions():
        b = named("tile_block", T.Bind(p // chunks))
        c = named("chunk", T.Bind(T.cast(p % chunks, "int32")))
        first, count = tiles_of_block(b, tiles, blocks)
        sums = named("sums", T.alloc_buffer((most, in_group, TILE), dtype))
        if groups:
            begin = named("begin", T.Bind(order.bound(c)))
            end = named("end", T.Bind(order.bound(c + 1)))
            with T.serial(end - begin) as i:
                position = named("position", T.Bind(begin + i))
                group(position, named("group", T.Bind(order.group(position))), in_group, b, first, count, sums)
        if rest:
            with T.If(c == chunks - 1), T.Then():
                group(groups, groups, rest, b, first, count, sums)


def vector_at(buffer: Any, base: Any, column: int, stride: int, isa: Isa) -> Any:
    """Load the vector of ``column`` (tile and part) from flat memory whose tiles are ``stride`` elements apart."""
    tile, part = divmod(column, isa.parts)
    return buffer[T.ramp(base + (tile * stride + part * isa.lanes), 1, isa.lanes)]


def tile_offset(buffer_channels: int, tile: Any) -> Any:
    """Elements before a tile when each of its channels has 16 of them."""
    return tile * (buffer_channels * TILE)
