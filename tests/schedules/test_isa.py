"""The registry of instruction sets, and that LLVM emits for each what its name promises."""

import re

import pytest

from whet.schedules.dense import DenseSpec, dense
from whet.schedules.isa import ISAS, compile_for, isa


def assembly(spec, target):
    return compile_for(dense(spec, target).func, target).mod.inspect_source("asm")


def inner_loops(asm):
    """Lines of each loop that contains no other: from a label to the jump back to it."""
    lines = asm.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    jumps = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.match(r"\tj\w+\s+(\.LBB\w+)", line))]
    loops = [(a, b) for a, b in jumps if a < b]
    return [lines[a : b + 1] for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def test_names():
    assert isa("avx2") is ISAS["avx2"]
    with pytest.raises(ValueError, match="isa is 'sse2'"):
        isa("sse2")


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("avx512_vnni", [r"vpdpbusd\s.*zmm"], ["tdpbsud"]),
        ("avx_vnni", [r"\{vex\}\s+vpdpbusd\s.*ymm"], ["zmm", r"%[xy]mm(1[6-9]|2\d|3\d)", r"\{1to"]),
        ("avx2", [r"vpmaddubsw", r"vpmaddwd"], ["vpdpbusd", "zmm", r"\{1to"]),
    ],
)
def test_instructions(name, has, lacks):
    asm = assembly(DenseSpec(64, 64, "i8_sparse", activation="gelu", output="quads"), ISAS[name])
    assert all(re.search(pattern, asm) for pattern in has)
    assert not any(re.search(pattern, asm) for pattern in lacks)
    assert not re.search(r"expf|erff|tanhf", asm), "a vector function became a call of libm per lane"


@pytest.mark.parametrize(
    ("spec", "isa_name"),
    [
        (DenseSpec(64, 768, "i8_sparse", 4), "avx512_vnni"),
        (DenseSpec(64, 768, "i8_sparse", 8), "avx512_vnni"),
        (DenseSpec(64, 768, "i8"), "avx512_vnni"),
        (DenseSpec(64, 768, "i8_sparse", 4), "avx_vnni"),
    ],
    ids=str,
)
def test_accumulators_stay_in_registers(spec, isa_name):
    loops = [loop for loop in inner_loops(assembly(spec, ISAS[isa_name])) if any("vpdpbusd" in line for line in loop)]
    assert loops
    for loop in loops:
        assert not [line for line in loop if "(%rsp" in line and "mm" in line], "\n".join(loop)
