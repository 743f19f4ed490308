"""A module built by hand from plain Relax and TIR, so that the runtime is tested without Whet's compiler.

Each token's column is ``word[id] + position[position] + type[token_type]``; per request it is the sum over the
request's tokens. No lane of padding reaches a result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from whet.link import write_module
from whet.runtime.metadata import Metadata, Output

VOCAB, POSITIONS, TYPES, CHANNELS, MAX_LENGTH, MAX_TOKENS = 50, 64, 2, 5, 64, 96

METADATA = Metadata(
    whet="0",
    tvm_ffi="0",
    name="tiny",
    task="hidden_states",
    convention="packed",
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    vocab_size=VOCAB,
    max_length=MAX_LENGTH,
    type_vocab_size=TYPES,
    pad_token_id=0,
    labels=(),
    output=Output("token", CHANNELS),
    precision="fp32",
    isa="avx2",
    cpu_flags=("avx2", "fma"),
    max_tokens=MAX_TOKENS,
)


def weights(channels: int = CHANNELS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal((rows, channels)).astype("float32")
        for name, rows in (("word", VOCAB), ("position", POSITIONS), ("type", TYPES))
    }


def columns(ids, positions, types, tables=None) -> np.ndarray:
    """The oracle, per token."""
    t = tables or weights()
    return t["word"][ids] + t["position"][positions] + t["type"][types]


def _kernels(channels: int, per: str):
    @T.prim_func(s_tir=True)
    def embed(
        ids_: T.handle, positions_: T.handle, types_: T.handle, word: T.Buffer((VOCAB, channels)),
        position: T.Buffer((POSITIONS, channels)), kind: T.Buffer((TYPES, channels)), out_: T.handle,
    ):  # fmt: skip
        nt = T.int64()
        ids = T.match_buffer(ids_, (nt, 16), "int32")
        positions = T.match_buffer(positions_, (nt, 16), "int32")
        types = T.match_buffer(types_, (nt, 16), "int32")
        out = T.match_buffer(out_, (nt, channels, 16))
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.parallel(nt):
                for c in T.serial(channels):
                    for i in T.serial(16):
                        out[t, c, i] = word[ids[t, i], c] + position[positions[t, i], c] + kind[types[t, i], c]

    @T.prim_func(s_tir=True)
    def total(x_: T.handle, segments_: T.handle, out_: T.handle):
        nt = T.int64()
        ng = T.int64()
        x = T.match_buffer(x_, (nt, channels, 16))
        segments = T.match_buffer(segments_, (ng, 16, 2), "int32")
        out = T.match_buffer(out_, (ng, channels, 16))
        with T.sblock("root"):
            T.reads()
            T.writes()
            for g in T.parallel(ng):
                for i in T.serial(16):
                    for c in T.serial(channels):
                        out[g, c, i] = T.float32(0)
                        for k in T.serial(segments[g, i, 1]):
                            out[g, c, i] = (
                                out[g, c, i] + x[(segments[g, i, 0] + k) // 16, c, (segments[g, i, 0] + k) % 16]
                            )

    return embed, total


def executable(channels: int = CHANNELS, per: str = "token"):
    embed, total = _kernels(channels, per)
    builder = relax.BlockBuilder()
    nt, ng = tirx.Var("nt", "int64"), tirx.Var("ng", "int64")
    tokens = [relax.Var(n, relax.TensorType((nt, 16), "int32")) for n in ("ids", "positions", "types")]
    segments = relax.Var("segments", relax.TensorType((ng, 16, 2), "int32"))
    tables = [relax.TensorType((rows, channels), "float32") for rows in (VOCAB, POSITIONS, TYPES)]
    params = relax.Var("params", relax.TupleType(tables))
    embed_var = builder.add_func(embed, "embed")
    total_var = builder.add_func(total, "total")
    with builder.function("main", [*tokens, segments, params]):
        with builder.dataflow():
            table = [builder.emit(relax.TupleGetItem(params, i)) for i in range(3)]
            out = builder.emit(
                relax.call_tir(embed_var, [*tokens, *table], relax.TensorType((nt, channels, 16), "float32"))
            )
            if per == "request":
                out = builder.emit(
                    relax.call_tir(total_var, [out, segments], relax.TensorType((ng, channels, 16), "float32"))
                )
            out = builder.emit_output(out)
        builder.emit_func_output(out)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    return relax.build(builder.get(), target)


def write(path: Path, per: str = "token", tokenizer: str | None = None, channels: int = CHANNELS, **changes) -> Path:
    metadata = replace(METADATA, output=Output(per, channels), **changes)
    write_module(executable(channels, per), metadata, weights(channels), tokenizer, path)
    return path
