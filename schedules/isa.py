"""The instruction sets that kernels are generated for, and the vector helpers that hide their differences.

A tile of 16 tokens is one vector of 16 lanes on 512-bit instruction sets and two vectors of 8 lanes on 256-bit ones;
kernels ask ``Isa.lanes``. All helpers that return values build TIR vector expressions; they work in ``T.prim_func``
and with the IR builder. Every instruction set computes the same integers, and the same floats where a helper is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

TILE = 16
"""Tokens in a tile (see whet.passes.dialect)."""

_V3_FLAGS = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4_FLAGS = (*_V3_FLAGS, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


_DOT2 = "whet_dot2"
_DOT2_DEFINITION = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @{_DOT2}(<16 x float> %acc, <16 x i32> %x, <16 x i32> %w) alwaysinline {{
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}}
"""


@dataclass(frozen=True)
class Isa:
    """One instruction set: what LLVM may emit for it and what a CPU must have to run that."""

    name: str
    lanes: int
    """32-bit lanes of a vector, 8 or 16."""
    registers: int
    """Vector registers of that width."""
    dot: Literal["bf16", "vnni512", "vnni256", "madd"]
    """What multiplies: ``dot2`` by vdpbf16ps; or ``dot4`` by EVEX or VEX vpdpbusd, or by vpmaddwd on 16-bit halves."""
    mcpu: str
    mattr: tuple[str, ...]
    cpu_flags: tuple[str, ...] = field(repr=False)
    """Flags, named as in /proc/cpuinfo, that a CPU needs to run code compiled for ``target``."""

    @property
    def target(self) -> dict[str, Any]:
        """The TVM target as a configuration, so that it can be printed and stored."""
        return {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.mcpu, "mattr": list(self.mattr)}

    @property
    def parts(self) -> int:
        """Vectors in a tile of 16 tokens."""
        return TILE // self.lanes

    @property
    def has_amx(self) -> bool:
        """Whether code may use the tile registers."""
        return "amx_tile" in self.cpu_flags

    def dot2(self, acc: Any, x: Any, w: Any) -> Any:
        """``acc + Σ x[i]·w[i]`` per lane over the 2 bfloat16 of a lane, in float32; within ``definitions`` only.

        ``acc`` is a float32 vector, ``x`` and ``w`` are int32 vectors, of ``lanes`` lanes.
        """
        if self.dot != "bf16":
            raise ValueError(f"{self.name} has no products of bfloat16; expected one of {', '.join(BF16_ISAS)}")
        return T.call_extern(f"float32x{self.lanes}", _DOT2, acc, x, w)

    def definitions(self) -> AbstractContextManager[Any]:
        """Define what the statements inside use beyond LLVM's intrinsics: TVM has no LLVM type for bfloat16."""
        return T.attr(0, "pragma_import_llvm", _DOT2_DEFINITION) if self.dot == "bf16" else nullcontext()

    def dot4(self, acc: Any, x: Any, w: Any) -> Any:
        """``acc + Σ x[i]·w[i]`` per lane over the 4 bytes of a lane, exact in int32.

        ``acc``, ``x`` and ``w`` are int32 vectors of ``lanes`` lanes; the bytes of ``x`` are unsigned, those of ``w``
        signed. On AVX2 this is two vpmaddwd on the even and odd bytes widened to 16 bits, for vpmaddubsw saturates (for
        weights known beforehand see whet.schedules.paired_i8). LLVM shares the widening between calls with the same
        operand.
        """
        lanes = self.lanes
        if self.dot == "bf16":
            raise ValueError(f"{self.name} is for products of bfloat16; expected one of {', '.join(ISAS)}")
        if self.dot != "madd":
            name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
            byte = f"int8x{4 * lanes}"
            return T.call_llvm_pure_intrin(f"int32x{lanes}", name, acc, T.reinterpret(byte, x), T.reinterpret(byte, w))
        half = f"int16x{2 * lanes}"

        def madd(a: Any, b: Any) -> Any:
            return T.call_llvm_pure_intrin(f"int32x{lanes}", "llvm.x86.avx2.pmadd.wd", a, b)

        eight = T.broadcast(T.int16(8), 2 * lanes)
        x_even = T.reinterpret(half, x & T.broadcast(T.int32(0x00FF00FF), lanes))
        x_odd = T.reinterpret(
            half, T.shift_right(T.reinterpret(f"uint16x{2 * lanes}", x), T.cast(eight, f"uint16x{2 * lanes}"))
        )
        w_even = T.shift_right(T.shift_left(T.reinterpret(half, w), eight), eight)
        w_odd = T.shift_right(T.reinterpret(half, w), eight)
        return acc + (madd(x_even, w_even) + madd(x_odd, w_odd))

    def register(self, dtype: str) -> Any:
        """Allocate a vector variable of float32 or int32, read and written as ``r[0]``; LLVM keeps it in a register.

        Scope "global" on purpose: TVM turns it into a stack slot, but scope "local" into a heap allocation.
        """
        return T.alloc_buffer((1,), f"{dtype}x{self.lanes}")


def _by_name(*isas: Isa) -> dict[str, Isa]:
    return {isa.name: isa for isa in isas}


ISAS = _by_name(
    Isa(
        "amx_int8",
        16,
        32,
        "vnni512",
        "x86-64-v4",
        ("+avx512vnni", "+avx512vbmi2", "+amx-tile", "+amx-int8"),
        (*_V4_FLAGS, "avx512_vnni", "avx512_vbmi2", "amx_tile", "amx_int8"),
    ),
    Isa("avx512_vnni", 16, 32, "vnni512", "x86-64-v4", ("+avx512vnni",), (*_V4_FLAGS, "avx512_vnni")),
    Isa("avx_vnni", 8, 16, "vnni256", "x86-64-v3", ("+avxvnni",), (*_V3_FLAGS, "avx_vnni")),
    Isa("avx2", 8, 16, "madd", "x86-64-v3", (), _V3_FLAGS),
)
"""The instruction sets for int8 and float32 by name, the fastest first."""

BF16_ISAS = _by_name(
    Isa(
        "amx_bf16",
        16,
        32,
        "bf16",
        "x86-64-v4",
        ("+avx512bf16", "+amx-tile", "+amx-bf16"),
        (*_V4_FLAGS, "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    Isa("avx512_bf16", 16, 32, "bf16", "x86-64-v4", ("+avx512bf16",), (*_V4_FLAGS, "avx512_bf16")),
)
"""Those for bfloat16."""

EVERY_ISA = BF16_ISAS | ISAS


def isa(name: str) -> Isa:
    """Return the instruction set of that name; ValueError if there is none."""
    if name not in EVERY_ISA:
        raise ValueError(f"isa is {name!r}; expected one of {', '.join(EVERY_ISA)}")
    return EVERY_ISA[name]


def compile_for(func: Any, target: Isa) -> Any:
    """Compile one kernel; returns the callable module."""
    return tvm.compile(func, target=tvm.target.Target(target.target))


def view(buffer: Any, shape: Sequence[Any], dtype: str) -> Any:
    """Show the same memory with another shape and element type, e.g. quads as int32 ``(tiles · K/4, 16)``."""
    return T.decl_buffer(shape, dtype, data=buffer.data)


def prefetch(buffer: Any, *indices: Any, level: int = 1) -> None:
    """Ask a cache for the line of an element, which may lie past the end: prefetching never faults."""
    read, keep, data = T.int32(0), T.int32(4 - level), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[indices]), read, keep, data))


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a·b + c`` rounded once, on every instruction set."""
    return T.call_llvm_pure_intrin(a.ty.dtype, "llvm.fma", a, b, c)


def splat(value: Any, lanes: int, dtype: str = "float32") -> Any:
    """Broadcast a value to every lane; Python numbers become ``dtype``."""
    if isinstance(value, int | float):
        value = tirx.const(value, dtype)
    return T.broadcast(value, lanes)


def clamp(x: Any, low: float, high: float, lanes: int) -> Any:
    """``min(max(x, low), high)`` of a float32 vector; a NaN becomes ``low``."""
    return T.min(T.max(x, splat(float(low), lanes)), splat(float(high), lanes))


def instruction(dtype: str, name: str, lanes: int, *args: Any) -> Any:
    """Call an integer instruction that AVX2 and AVX-512BW share, by LLVM's name for it, in full vectors."""
    full = f"avx512.{name}.512" if lanes == 16 else f"avx2.{name}"
    return T.call_llvm_pure_intrin(dtype, f"llvm.x86.{full}", *args)


def round_int(x: Any, lanes: int) -> Any:
    """Float32 vector to int32, to nearest, halves to even (vcvtps2dq); ``x`` must fit int32."""
    return T.call_llvm_pure_intrin(f"int32x{lanes}", "llvm.lrint", x)


def round2(a: Any, b: Any, lanes: int) -> Any:
    """Round two float32 vectors to int16, halves to even, and pack them into one vector.

    What int16 can't hold saturates; values from 2³¹ and NaN become the smallest. Each 128 bits hold four lanes of
    ``a``, then the same four of ``b``.
    """
    return instruction(f"int16x{2 * lanes}", "packssdw", lanes, round_int(a, lanes), round_int(b, lanes))


def pack_bytes(ab: Any, cd: Any, lanes: int, *, signed: bool = False) -> Any:
    """Pack two results of ``round2`` into the bytes of one int32 vector, a in the low byte, then b, c, d; saturates."""
    byte = f"int8x{4 * lanes}"
    packed = instruction(byte, "packsswb" if signed else "packuswb", lanes, ab, cd)
    first_of_each = [T.int32(0x0C080400 + 0x01010101 * (lane % 4)) for lane in range(lanes)]
    order = tirx.Shuffle(first_of_each, [T.int32(lane) for lane in range(lanes)])
    return T.reinterpret(f"int32x{lanes}", instruction(byte, "pshuf.b", lanes, packed, T.reinterpret(byte, order)))


def round_bf16(low: Any, high: Any) -> Any:
    """Round two vectors of 16 float32 to bfloat16, halves to even, and pack them into one int32 vector.

    Needs an instruction set for bfloat16. Denormals become 0.
    """
    # LLVM's type of the result is bfloat16, which TVM has no other name for; all that is done with it is moving bits.
    halves = T.call_llvm_pure_intrin("int16x32", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", high, low)
    return T.reinterpret("int32x16", tirx.Shuffle([halves], [T.int32(i // 2 + 16 * (i % 2)) for i in range(32)]))


def round_bf16_row(x: Any) -> Any:
    """Round a vector of 16 float32 to bfloat16 as ``round_bf16`` does; returns their bits as uint16."""
    return T.reinterpret("uint16x16", T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx512bf16.cvtneps2bf16.512", x))


def round4(rows: Sequence[Any], lanes: int, *, signed: bool = False) -> Any:
    """Round four float32 vectors to bytes, halves to even, and pack them into one int32 vector, the first lowest.

    What uint8 (int8 if ``signed``) can't hold saturates; values from 2³¹ and NaN become the smallest.
    """
    a, b, c, d = rows
    return pack_bytes(round2(a, b, lanes), round2(c, d, lanes), lanes, signed=signed)


def quantize4(rows: Sequence[Any], inverses: Sequence[Any], zero: Any, lanes: int) -> Any:
    """Requantise: ``clamp(round_half_even(y · inverse + zero), 0, 255)`` of four float32 vectors, packed into one."""
    return round4([fma(y, inverse, zero) for y, inverse in zip(rows, inverses, strict=True)], lanes)
