"""What lets requests of a batch leave early: who stays, where tokens and records move to, who is answered by what.

``stay`` closes the ranks of the requests whose answer is not trusted enough. How many they are is known to the kernel
alone, so it writes the sizes of its outputs beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.schedules.elementwise import Quantization, declare_quads, lanes_of, words
from whet.schedules.gemm import named, parameter
from whet.schedules.isa import TILE, Isa

NOBODY = -1
"""Number of the request of an unused entry."""


@dataclass(frozen=True)
class StaySpec:
    """The choice of requests that stay.

    Arguments: trust ``(ng, 16)`` float32, segments ``(ng, 16, 2)`` int32, requests ``(ng, 16)`` int32 (the number of
    each entry's request; without them, ``numbered`` False, entries count from 0), exits ``(2, caches)`` float32, whose
    second row holds thresholds, the one of this cache at ``number``. Outputs: segments and requests of those that stay,
    in the same order; sources ``(nt, 16)`` int32, for every token its number before; live ``(3,)`` int32, the sizes of
    these three.

    An entry leaves if its trust reaches the threshold. Lanes past the last token count on, as far as its tile
    goes.
    """

    number: int
    caches: int
    numbered: bool


@dataclass(frozen=True)
class MoveSpec:
    """Tokens at their new places, in all forms that their value has.

    Arguments: sources ``(nt', 16)`` int32, x ``(nt, C, 16)`` float32, and its rounded form; outputs: the same forms of
    ``nt'`` tiles.
    """

    channels: int
    quantize: Quantization


@dataclass(frozen=True)
class FollowSpec:
    """The records of those that stay.

    Arguments: requests ``(ng', 16)`` int32, as ``stay`` writes them, records ``(ng, 16, 2)`` int64; out
    ``(ng', 16, 2)`` int64, 0 in unused entries.
    """


@dataclass(frozen=True)
class SettleSpec:
    """The last answer that each request got, after how many layers it came, and how far it is trusted.

    Arguments: answer ``(ng, C, 16)`` and trust ``(ng, 16)`` float32 of all requests; then answer ``(ng', C, 16)`` and
    trust ``(ng', 16)`` of some, and the numbers of those, ``(ng', 16)`` int32, for each further number of layers but
    the last, whose answers have no trust: it is 1. out ``(ng, C + 2, 16)``: the answer, layers, trust.
    """

    outputs: int
    layers: tuple[int, ...]


def stay(spec: StaySpec, _isa: Isa) -> tirx.PrimFunc:
    """Kernel for the choice of those that stay, serial; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("stay")
            groups, tiles = named("groups", T.int64()), named("tiles", T.int64())
            trust = parameter("trust", (groups, TILE), "float32")
            segments = parameter("segments", (groups, TILE, 2), "int32")
            requests = parameter("requests", (groups, TILE), "int32") if spec.numbered else None
            exits = parameter("exits", (2, spec.caches), "float32")
            kept = parameter("kept_segments", (groups, TILE, 2), "int32")
            numbers = parameter("kept_requests", (groups, TILE), "int32")
            sources = parameter("sources", (tiles, TILE), "int32")
            live = parameter("live", (3,), "int32")
            with T.sblock("root"):
                T.reads()
                T.writes()
                count, end = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
                T.buffer_store(count, T.int32(0), [0])
                T.buffer_store(end, T.int32(0), [0])
                with T.serial(groups) as group, T.serial(TILE) as lane:
                    start = named("start", T.Bind(segments[group, lane, 0]))
                    length = named("length", T.Bind(segments[group, lane, 1]))
                    with T.If(tirx.all(length > 0, trust[group, lane] < exits[1, spec.number])), T.Then():
                        entry, first = T.Bind(count[0]), T.Bind(end[0])
                        number = T.cast(group * TILE + lane, "int32") if requests is None else requests[group, lane]
                        _enter(kept, numbers, entry, (first, length), number)
                        with T.serial(length) as i:
                            _set(sources, first + i, start + i)
                        T.buffer_store(count, entry + 1, [0])
                        T.buffer_store(end, first + length, [0])
                groups_left = T.Bind((count[0] + (TILE - 1)) // TILE)
                tiles_left = T.Bind((end[0] + (TILE - 1)) // TILE)
                with T.serial(groups_left * TILE - count[0]) as i:
                    _enter(kept, numbers, T.Bind(count[0] + i), (T.int32(0), T.int32(0)), T.int32(NOBODY))
                with T.serial(tiles_left * TILE - end[0]) as i:
                    last = T.Bind(end[0] - 1)
                    source = T.Bind(sources[last // TILE, last % TILE])
                    # So that the tile of a request that stays where it is moves as a whole.
                    _set(sources, end[0] + i, T.min(source + 1 + i, source // TILE * TILE + (TILE - 1)))
                for i, size in enumerate((groups_left, groups_left, tiles_left)):
                    T.buffer_store(live, size, [i])
        return builder.get()


def _enter(segments: Any, requests: Any, entry: Any, bounds: tuple[Any, Any], request: Any) -> None:
    for i, bound in enumerate(bounds):
        T.buffer_store(segments, bound, [entry // TILE, entry % TILE, i])
    T.buffer_store(requests, request, [entry // TILE, entry % TILE])


def _set(sources: Any, token: Any, source: Any) -> None:
    T.buffer_store(sources, source, [token // TILE, token % TILE])


def move(spec: MoveSpec, isa: Isa) -> tirx.PrimFunc:
    """Kernel that moves tokens, parallel over the tiles that are left; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("move")
            tiles, left = named("tiles", T.int64()), named("left", T.int64())
            sources = parameter("sources", (left, TILE), "int32")
            before = _declare(spec, "", tiles)
            after = _declare(spec, "moved_", left)
            with T.sblock("root"):
                T.reads()
                T.writes()
                # As rows of 16 words of 32 bits, one of each token.
                forms = [
                    [f if f.dtype == "float32" else words(f) for f in pair] for pair in zip(before, after, strict=True)
                ]
                with T.parallel(left) as tile:
                    first = named("first", T.Bind(sources[tile, 0]))
                    whole = T.alloc_buffer((1,), "bool")
                    T.buffer_store(whole, first % TILE == 0, [0])
                    with T.serial(TILE) as lane:
                        T.buffer_store(
                            whole, tirx.all(whole[0], sources[tile, lane] == first + T.cast(lane, "int32")), [0]
                        )
                    with T.If(whole[0]):
                        with T.Then():
                            for x, y in forms:
                                with T.serial(x.shape[1]) as row, T.serial(isa.parts) as part:
                                    at = lanes_of(part, isa)
                                    T.buffer_store(y, x[first // TILE, row, at], [tile, row, at])
                        with T.Else(), T.serial(TILE) as lane:
                            source = named("source", T.Bind(sources[tile, lane]))
                            for x, y in forms:
                                with T.serial(x.shape[1]) as row:
                                    T.buffer_store(y, x[source // TILE, row, source % TILE], [tile, row, lane])
        return builder.get()


def _declare(spec: MoveSpec, prefix: str, tiles: Any) -> list[Any]:
    """Declare the forms of a value as parameters."""
    x = parameter(prefix + "x", (tiles, spec.channels, TILE), "float32")
    return [x, *(form for form in declare_quads(spec.quantize, tiles, spec.channels) if form is not None)]


def follow(_spec: FollowSpec, _isa: Isa) -> tirx.PrimFunc:
    """Kernel that takes records along, serial; the arguments are the specification's."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("follow")
            groups, left = named("groups", T.int64()), named("left", T.int64())
            requests = parameter("requests", (left, TILE), "int32")
            records = parameter("records", (groups, TILE, 2), "int64")
            out = parameter("out", (left, TILE, 2), "int64")
            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.serial(left) as group, T.serial(TILE) as lane:
                    number = named("number", T.Bind(requests[group, lane]))
                    for i in range(2):
                        T.buffer_store(out, T.int64(0), [group, lane, i])
                        with T.If(number != NOBODY), T.Then():
                            T.buffer_store(out, records[number // TILE, number % TILE, i], [group, lane, i])
        return builder.get()


def settle(spec: SettleSpec, _isa: Isa) -> tirx.PrimFunc:
    """Kernel that gathers the answers, serial; the arguments are the specification's."""
    first, *later, last = spec.layers
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("settle")
            groups = named("groups", T.int64())
            answer = parameter("answer", (groups, spec.outputs, TILE), "float32")
            trust = parameter("trust", (groups, TILE), "float32")
            some = []
            for layer in (*later, last):
                left = named(f"groups_{layer}", T.int64())
                some.append(
                    (
                        layer,
                        left,
                        parameter(f"answer_{layer}", (left, spec.outputs, TILE), "float32"),
                        None if layer == last else parameter(f"trust_{layer}", (left, TILE), "float32"),
                        parameter(f"requests_{layer}", (left, TILE), "int32"),
                    )
                )
            out = parameter("out", (groups, spec.outputs + 2, TILE), "float32")

            def put(of: tuple[Any, Any], to: tuple[Any, Any], values: Any, layer: int, trusted: Any) -> None:
                (group, lane), (to_group, to_lane) = of, to
                with T.serial(spec.outputs) as c:
                    T.buffer_store(out, values[group, c, lane], [to_group, c, to_lane])
                T.buffer_store(out, T.float32(layer), [to_group, spec.outputs, to_lane])
                T.buffer_store(out, trusted, [to_group, spec.outputs + 1, to_lane])

            with T.sblock("root"):
                T.reads()
                T.writes()
                with T.serial(groups) as group, T.serial(TILE) as lane:
                    put((group, lane), (group, lane), answer, first, trust[group, lane])
                for layer, left, values, trusts, requests in some:
                    with T.serial(left) as group, T.serial(TILE) as lane:
                        number = named("number", T.Bind(requests[group, lane]))
                        with T.If(number != NOBODY), T.Then():
                            trusted = T.float32(1) if trusts is None else trusts[group, lane]
                            put((group, lane), (number // TILE, number % TILE), values, layer, trusted)
        return builder.get()
