"""Run a command as on a CPU without AMX: most CPUs in use have none, and engines differ in what they make of it.

    python benchmarks/without_amx.py whet bench m.so --against onnxruntime --model path/to/model

Linux gives a process the tile registers when it asks (``arch_prctl``, ``ARCH_REQ_XCOMP_PERM``). A seccomp filter
refuses that to the command and all it starts; Whet, compiled for ``avx512_vnni``, and ONNX Runtime then use VNNI.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the second with EPERM
NUMBER, FIRST_ARGUMENT = 0, 16
"""Offsets in the kernel's ``seccomp_data``."""


class Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def refuse_amx() -> None:
    """Refuse the tile registers to this process and its children; OSError if the kernel takes no filter."""
    instructions = [
        Instruction(LOAD, 0, 0, NUMBER),
        Instruction(JUMP_IF_EQUAL, 0, 3, SYS_ARCH_PRCTL),
        Instruction(LOAD, 0, 0, FIRST_ARGUMENT),
        Instruction(JUMP_IF_EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
        Instruction(RETURN, 0, 0, REFUSE),
        Instruction(RETURN, 0, 0, ALLOW),
    ]
    array = (Instruction * len(instructions))(*instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(instructions), array)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel does not take the filter")
    if libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0:
        raise OSError("the kernel granted the tile registers in spite of the filter")


def main() -> None:
    """Refuse AMX and become the command."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} COMMAND …")
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
