"""Assemble kernel calls into one function, and plan the memory of everything between them.

Before: ``main`` after ``lower``, nothing but ``call_tir``. After: a TIR function

    main(ids, positions, token_types, segments, [records,] weights, workspace, out)

that calls the kernels directly: no virtual machine, no allocation, no reference counts. ``weights`` is the blob of all
weights; ``workspace`` is scratch memory, so many bytes per tile and so many per group of requests, of which there are
no more than tiles. Values whose lives do not overlap share it. A kernel runs in parallel only from the number of tiles
(or groups, if it sees no tokens) on at which that pays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias

import tvm
from tvm import IRModule, relax, s_tir, tirx
from tvm.ir import GlobalVar, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .dialect import TILE
from .graph import Graph

ALIGNMENT = 64
"""Every value starts at a multiple of this: kernels load whole cache lines."""

READS_ALL_WEIGHTS = "whet.reads_all_weights"
"""Attribute of a kernel that reads its weights from end to end for every tile (and does not look rows up in tables)."""

OVERWRITES = "whet.overwrites"
"""Attribute of a kernel: number of the parameter that its first output may lie over, element on element."""

READS_LAST = "whet.reads_last"
"""Attribute of a kernel that makes fewer tiles than it is given: it is for the last of them, not for the first."""

LIVE = "whet.live"
"""Attribute of a kernel that writes sizes, as int32 to its last output: the unit of each other output's first one."""

NANOSECONDS_PER_BYTE = 0.046
"""Time a core takes per tile for each byte of weights (int8: 16 multiply-adds at 350 G/s) or of results."""
REGION_NANOSECONDS = 12_000
"""Work from which a parallel region pays: starting and ending one takes about 4 µs."""

Unit: TypeAlias = Literal["tile", "group"]
"""What the size of a value is proportional to."""

Value: TypeAlias = tuple[relax.Var, int]
"""One tensor: an output of a kernel call, an input (output 0 of itself), or a weight (of the tuple of weights)."""


@dataclass(frozen=True)
class Workspace:
    """Bytes of scratch memory that ``main`` wants."""

    per_tile: int
    per_group: int


@dataclass(frozen=True)
class Assembled:
    """``module[entry]``, the kernels it calls, and its memory."""

    module: IRModule
    workspace: Workspace


@dataclass(frozen=True, eq=False)
class _Left:
    """What a kernel left of the batch: which number of ``live`` counts what, and by which variable types say so."""

    live: Value
    places: dict[Unit, int]
    symbols: dict[Unit, tirx.Var]


@dataclass
class _Slot:
    """A stretch of the workspace that values use in turn; ``size`` is in bytes per unit."""

    unit: Unit
    size: int
    free: bool = False


def assemble(module: IRModule, weight_offsets: Sequence[int], entry: str = "main") -> Assembled:
    """Assemble a lowered module whose weights stand at these bytes of the blob, in order, as a function ``entry``."""
    return _Assembly(relax.transform.LegalizeOps()(module), weight_offsets).run(entry)


class _Assembly:
    def __init__(self, module: IRModule, weight_offsets: Sequence[int]) -> None:
        self.module = module
        self.graph = Graph(module)
        *self.inputs, self.weights = self.graph.params
        self.weight_offsets = weight_offsets
        self.calls = [b for b in self.graph.bindings if isinstance(b.value, relax.Call)]
        self.result = self.value(self.graph.result)
        self.units: dict[tirx.Var, Unit] = {self.inputs[0].ty.shape[0]: "tile", self.inputs[3].ty.shape[0]: "group"}
        self.stages: dict[tirx.Var, _Left] = {}
        for binding in self.calls:
            self.note_what_is_left(binding)
        self.slots: list[_Slot] = []
        self.subroutines: dict[tuple[GlobalVar, bool], tuple[GlobalVar, tirx.PrimFunc]] = {}

    def run(self, entry: str) -> Assembled:
        slots = self.plan()
        with IRBuilder() as builder, T.prim_func():
            T.func_name(entry)
            counts: dict[Unit, Any] = {"tile": T.int64(), "group": T.int64()}
            shapes = {"tile": (counts["tile"], TILE), "group": (counts["group"], TILE, 2)}
            pointers = {(p, 0): _argument(p.name, shapes[self.unit(p.ty)], str(p.ty.dtype)).data for p in self.inputs}
            blob = _argument("weights", (T.int64(),), "uint8").data
            scratch = _argument("workspace", (T.int64(),), "uint8").data
            result = self.type_of(self.result)
            out = _argument("out", (counts[self.unit(result)], shape_of_type(result)[1], TILE), "float32")
            pointers[self.result] = out.data
            for i, offset in enumerate(self.weight_offsets):
                pointers[self.weights, i] = T.handle_add_byte_offset(blob, offset)
            offsets = self.offsets(counts)
            for value, slot in slots.items():
                pointers[value] = T.handle_add_byte_offset(scratch, offsets[id(slot)])
            sizes = {symbol: counts[unit] for symbol, unit in self.units.items() if symbol not in self.stages}
            lives = self.declare_lives(pointers)
            for left, bindings in groupby(self.calls, self.stage_of):
                with self.unless_all_left(lives, left):
                    here = sizes | self.sizes_left(lives)
                    for binding in bindings:
                        unit = self.grows_with(binding)
                        self.emit(binding, pointers, here, here[left.symbols[unit]] if left else counts[unit])
        main = builder.get().with_attr("global_symbol", entry)
        functions = {GlobalVar(entry): main, **dict(self.subroutines.values())}
        sizes = {unit: sum(s.size for s in self.slots if s.unit == unit) for unit in ("tile", "group")}
        return Assembled(IRModule(functions), Workspace(sizes["tile"], sizes["group"]))

    # What the graph says.

    def value(self, expr: relax.Expr) -> Value:
        """The tensor behind a variable."""
        expr = self.graph.source(expr)
        item = self.graph.values.get(expr)
        if isinstance(item, relax.TupleGetItem):
            return self.graph.source(item.tuple_value), int(item.index)
        return expr, 0

    def type_of(self, value: Value) -> relax.TensorType:
        var, index = value
        return var.ty.fields[index] if isinstance(var.ty, relax.TupleType) else var.ty

    def unit(self, ty: relax.TensorType) -> Unit:
        return self.units[ty.shape[0]]

    def made(self, binding: relax.VarBinding) -> list[Value]:
        """The tensors that a kernel call writes."""
        count = len(binding.var.ty.fields) if isinstance(binding.var.ty, relax.TupleType) else 1
        return [(binding.var, i) for i in range(count)]

    def read(self, binding: relax.VarBinding) -> list[Value]:
        """The tensors that a kernel call reads."""
        return [self.value(a) for a in binding.value.args[1].fields]

    def grows_with(self, binding: relax.VarBinding) -> Unit:
        """What the work of a kernel is proportional to: tiles if it sees tokens, else groups."""
        units = {self.units.get(self.type_of(v).shape[0]) for v in (*self.read(binding), *self.made(binding))}
        return "tile" if "tile" in units else "group"

    # What is left of the batch.

    def note_what_is_left(self, binding: relax.VarBinding) -> None:
        """Take in the sizes that a kernel decides on."""
        units = self.module[binding.value.args[0]].attrs.get(LIVE)
        if units is None:
            return
        *made, live = self.made(binding)
        places: dict[Unit, int] = {str(unit): i for i, unit in enumerate(units)}  # type: ignore[misc]
        symbols = {unit: self.type_of(made[i]).shape[0] for unit, i in places.items()}
        left = _Left(live, places, symbols)
        for unit, symbol in symbols.items():
            self.units[symbol] = unit
            self.stages[symbol] = left

    def stage_of(self, binding: relax.VarBinding) -> _Left | None:
        """What the batch was reduced to before the kernel runs; None if to nothing less."""
        decides = LIVE in self.module[binding.value.args[0]].attrs
        value = (self.read(binding) if decides else self.made(binding))[0]
        return self.stages.get(self.type_of(value).shape[0])

    def declare_lives(self, pointers: dict[Value, Any]) -> dict[Value, Any]:
        """Buffers of the sizes that kernels decide on, all 0 at first."""
        lives: dict[Value, Any] = {}
        for left in self.stages.values():
            if left.live not in lives:
                lives[left.live] = buffer = T.alloc_buffer((len(left.places) + 1,), "int32")
                pointers[left.live] = buffer.data
                for i in range(len(left.places) + 1):
                    T.buffer_store(buffer, T.int32(0), [i])
        return lives

    def sizes_left(self, lives: Mapping[Value, Any]) -> dict[tirx.Var, Any]:
        """The sizes that kernels have decided on so far."""
        return {
            symbol: T.Bind(T.cast(lives[left.live][left.places[self.units[symbol]]], "int64"))
            for symbol, left in self.stages.items()
        }

    @contextmanager
    def unless_all_left(self, lives: Mapping[Value, Any], left: _Left | None) -> Iterator[None]:
        """Emit what follows for the case that anything is left."""
        if left is None:
            yield
            return
        with T.If(lives[left.live][left.places["group"]] > 0), T.Then():
            yield

    # Memory.

    def plan(self) -> dict[Value, _Slot]:
        """Give every value between two kernels a slot; a slot is free again after its value's last reader."""
        last = {value: i for i, binding in enumerate(self.calls) for value in self.read(binding)}
        lives = {left.live for left in self.stages.values()}
        slots: dict[Value, _Slot] = {}
        for i, binding in enumerate(self.calls):
            made = [value for value in self.made(binding) if value != self.result and value not in lives]
            over = self.overwritten(binding)
            if over not in slots or last[over] != i or self.made(binding)[0] == self.result:
                over = None
            for value in made:
                slots[value] = slots[over] if over and value == made[0] else self.take(self.type_of(value))
            for value in {*self.read(binding), *made} - {over}:
                if value in slots and last.get(value, i) == i:
                    slots[value].free = True
        return slots

    def overwritten(self, binding: relax.VarBinding) -> Value | None:
        """The tensor that the first output may lie over, if the kernel allows it and reads that tensor once."""
        position = self.module[binding.value.args[0]].attrs.get(OVERWRITES)
        if position is None:
            return None
        read = self.read(binding)
        value = read[int(position)]
        return value if read.count(value) == 1 else None

    def take(self, ty: relax.TensorType) -> _Slot:
        """Take the free slot that fits best, or a new one.

        No request is empty, so a batch has at least as many tiles as groups of 16 requests: what is per group may lie
        where tiles lay, in memory that is in the cache.
        """
        unit, size = self.unit(ty), _bytes(ty, of_unit=True)
        size += -size % ALIGNMENT
        free = [s for s in self.slots if s.free and (s.unit == unit or (s.unit == "tile" and s.size >= size))]
        if free:
            slot = min(free, key=lambda s: (max(0, size - s.size), s.size))
            slot.size, slot.free = max(slot.size, size), False
        else:
            slot = _Slot(unit, size)
            self.slots.append(slot)
        return slot

    def offsets(self, counts: Mapping[Unit, Any]) -> dict[int, Any]:
        """Where each slot starts in the workspace, by identity: first those per tile, then those per group."""
        found: dict[int, Any] = {}
        before: Any = 0
        for unit in ("tile", "group"):
            size = 0
            for slot in self.slots:
                if slot.unit == unit:
                    found[id(slot)] = before + counts[unit] * size
                    size += slot.size
            before = before + counts[unit] * size
        return found

    # Code.

    def emit(
        self, binding: relax.VarBinding, pointers: Mapping[Value, Any], counts: Mapping[tirx.Var, Any], units: Any
    ) -> None:
        """Call a kernel for so many units: the addresses of its tensors, then the sizes it does not know."""
        kernel = binding.value.args[0]
        values = [*self.read(binding), *self.made(binding)]
        sizes: dict[tirx.Var, Any] = {}
        pairs = list(zip(self.module[kernel].params, values, strict=True))
        # A kernel may be given more tiles than it is for: how many is said by what it makes, unless it decides on that.
        for parameter, value in pairs if LIVE in self.module[kernel].attrs else reversed(pairs):
            for wanted, given in zip(parameter.ty.shape, shape_of_type(self.type_of(value)), strict=True):
                if isinstance(wanted, tirx.Var) and wanted not in sizes:
                    sizes[wanted] = tirx.const(given, "int64") if isinstance(given, int) else counts[given]
        addresses = [pointers[v] for v in values]
        if self.module[kernel].attrs.get(READS_LAST):
            for i, (parameter, value) in enumerate(pairs):
                wanted, given = parameter.ty.shape[0], self.type_of(value).shape[0]
                if given in counts:
                    others = counts[given] - sizes[wanted]
                    offset = others * _bytes(self.type_of(value), of_unit=True)
                    addresses[i] = T.handle_add_byte_offset(addresses[i], offset)
        arguments = [*addresses, *(sizes[s] for s in _symbols(self.module[kernel]))]

        def call(parallel: bool) -> None:
            T.evaluate(tvm.ir.Call(self.subroutine(kernel, parallel), arguments))

        least = self.pays_from(binding)
        if least <= 1:
            call(parallel=True)
            return
        with T.If(units < least):
            with T.Then():
                call(parallel=False)
            with T.Else():
                call(parallel=True)

    def pays_from(self, binding: relax.VarBinding) -> int:
        """Number of units (tiles or groups) from which the kernel is worth a parallel region."""
        counted = self.made(binding)
        if self.module[binding.value.args[0]].attrs.get(READS_ALL_WEIGHTS):
            counted = counted + [value for value in self.read(binding) if value[0].same_as(self.weights)]
        size = sum(_bytes(self.type_of(value), of_unit=value[0] is not self.weights) for value in counted)
        return math.ceil(REGION_NANOSECONDS / (NANOSECONDS_PER_BYTE * size))

    def subroutine(self, kernel: GlobalVar, parallel: bool) -> GlobalVar:
        """A kernel as a function of addresses and sizes, made once each for parallel and serial use."""
        if (kernel, parallel) not in self.subroutines:
            name = kernel.name_hint if parallel else kernel.name_hint + "_serial"
            self.subroutines[kernel, parallel] = GlobalVar(name), _by_address(self.module[kernel], parallel)
        return self.subroutines[kernel, parallel][0]


def shape_of_type(ty: relax.TensorType) -> list[Any]:
    """Dimensions of a tensor type: Python ints where they are known, TIR expressions elsewhere."""
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in ty.shape]


def _argument(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


def _bytes(ty: relax.TensorType, of_unit: bool) -> int:
    """Size of a tensor, or of one unit (tile or group) of it."""
    shape = shape_of_type(ty)[1:] if of_unit else shape_of_type(ty)
    return int(math.prod(shape) * tvm.DataType(str(ty.dtype)).bits // 8)


def _symbols(kernel: tirx.PrimFunc) -> list[tirx.Var]:
    """Sizes that a kernel learns when it is called."""
    return list({d: None for p in kernel.params for d in p.ty.shape if isinstance(d, tirx.Var)})


def _by_address(kernel: tirx.PrimFunc, parallel: bool) -> tirx.PrimFunc:
    """A kernel that takes tensors as one that takes their addresses and then its symbolic sizes."""
    addresses = [tirx.Var(p.name, PointerType(PrimType(str(p.ty.dtype)))) for p in kernel.params]
    views = [tirx.DeclBuffer(p, data=a) for p, a in zip(kernel.params, addresses, strict=True)]
    root = kernel.body
    block = root.block
    body = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        tirx.SeqStmt([*views, block.body if parallel else _serial(block.body)]),
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )
    realized = s_tir.SBlockRealize(root.iter_values, root.predicate, body)
    # The return value is the error code that a parallel region may give. There must be no statement that returns 0: TVM
    # frees what the kernel allocated after the last statement.
    function = tirx.PrimFunc([*addresses, *_symbols(kernel)], realized, ret_type=PrimType("int32"))
    return function.with_attrs({k: v for k, v in kernel.attrs.items() if k != "global_symbol"})


def _serial(statement: tirx.Stmt) -> tirx.Stmt:
    """Kernels have their parallel loops at the top of their bodies: the same with loops that are serial."""
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_serial(s) for s in statement.seq])
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        return tirx.For(statement.loop_var, statement.min, statement.extent, tirx.ForKind.SERIAL, statement.body)
    return statement
