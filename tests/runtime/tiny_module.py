"""Modules built by hand from plain TIR and Relax, so that the runtime is tested without Whet's compiler.

Each token's column is ``word[id] + position[position] + type[token_type]``; per request it is the sum over the
request's tokens. No lane of padding reaches a result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tvm import relax, tirx
from tvm.script import tirx as T

from whet.link import Blob, write_module
from whet.runtime.metadata import Metadata, Output, Weight

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
    multi_label=False,
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


def executable(channels: int = CHANNELS, per: str = "token", entry: str = "main"):
    """The packed convention: a function that writes its result, with weights in a blob and scratch memory."""
    tables = weights(channels)
    held, table = stored(tables)
    word, position, kind = (weight.offset // 4 for weight in table)
    floats = held.size // 4

    @T.prim_func(s_tir=True)
    def tokens(
        ids_: T.handle, positions_: T.handle, types_: T.handle, segments_: T.handle, weights_: T.handle,
        workspace_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": entry})
        nt, ng, blob, space = T.int64(), T.int64(), T.int64(), T.int64()
        ids = T.match_buffer(ids_, (nt, 16), "int32")
        positions = T.match_buffer(positions_, (nt, 16), "int32")
        types = T.match_buffer(types_, (nt, 16), "int32")
        T.match_buffer(segments_, (ng, 16, 2), "int32")
        weights = T.match_buffer(weights_, (blob,), "uint8")
        T.match_buffer(workspace_, (space,), "uint8")
        out = T.match_buffer(out_, (nt, channels, 16))
        with T.sblock("root"):
            T.reads()
            T.writes()
            rows_of = T.decl_buffer((floats,), "float32", data=weights.data)
            for t in T.parallel(nt):
                for c in T.serial(channels):
                    for i in T.serial(16):
                        out[t, c, i] = (
                            rows_of[word + ids[t, i] * channels + c]
                            + rows_of[position + positions[t, i] * channels + c]
                            + rows_of[kind + types[t, i] * channels + c]
                        )

    @T.prim_func(s_tir=True)
    def requests(
        ids_: T.handle, positions_: T.handle, types_: T.handle, segments_: T.handle, weights_: T.handle,
        workspace_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": entry})
        nt, ng, blob, space = T.int64(), T.int64(), T.int64(), T.int64()
        ids = T.match_buffer(ids_, (nt, 16), "int32")
        positions = T.match_buffer(positions_, (nt, 16), "int32")
        types = T.match_buffer(types_, (nt, 16), "int32")
        segments = T.match_buffer(segments_, (ng, 16, 2), "int32")
        weights = T.match_buffer(weights_, (blob,), "uint8")
        workspace = T.match_buffer(workspace_, (space,), "uint8")
        out = T.match_buffer(out_, (ng, channels, 16))
        with T.sblock("root"):
            T.reads()
            T.writes()
            rows_of = T.decl_buffer((floats,), "float32", data=weights.data)
            rows = T.decl_buffer((nt, channels, 16), "float32", data=workspace.data)
            for t in T.parallel(nt):
                for c in T.serial(channels):
                    for i in T.serial(16):
                        rows[t, c, i] = (
                            rows_of[word + ids[t, i] * channels + c]
                            + rows_of[position + positions[t, i] * channels + c]
                            + rows_of[kind + types[t, i] * channels + c]
                        )
            for g in T.parallel(ng):
                for i in T.serial(16):
                    for c in T.serial(channels):
                        out[g, c, i] = T.float32(0)
                        for k in T.serial(segments[g, i, 1]):
                            out[g, c, i] = (
                                out[g, c, i] + rows[(segments[g, i, 0] + k) // 16, c, (segments[g, i, 0] + k) % 16]
                            )

    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    return tvm.compile(requests if per == "request" else tokens, target)


def padded_executable(channels: int = CHANNELS):
    """The padded convention: word rows of (batch, sequence) ids, zero where the mask is, and a second output."""
    builder = relax.BlockBuilder()
    shape = (tirx.Var("batch", "int64"), tirx.Var("sequence", "int64"))
    ids, mask = (relax.Var(n, relax.TensorType(shape, "int64")) for n in ("input_ids", "attention_mask"))
    tables = [relax.TensorType((rows, channels), "float32") for rows in (VOCAB, POSITIONS, TYPES)]
    params = relax.Var("params", relax.TupleType(tables))
    with builder.function("main", [ids, mask, params]):
        with builder.dataflow():
            word = builder.emit(relax.TupleGetItem(params, 0))
            rows = builder.emit(relax.op.take(word, ids, axis=0))
            kept = builder.emit(relax.op.expand_dims(relax.op.astype(mask, "float32"), -1))
            out = builder.emit(relax.op.multiply(rows, kept))
            first = builder.emit(relax.op.sum(out, axis=-1))
            second = builder.emit(relax.op.negative(first))
            out = builder.emit_output(relax.Tuple([out]) if channels != 2 else relax.Tuple([first, second]))
        builder.emit_func_output(out)
    return relax.build(builder.get(), tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}))


def stored(arrays: dict[str, np.ndarray]) -> tuple[Blob, tuple[Weight, ...]]:
    blob = Blob()
    return blob, tuple(blob.add(*named) for named in arrays.items())


def write(path: Path, per: str = "token", tokenizer: str | None = None, channels: int = CHANNELS, **changes) -> Path:
    return write_variants(path, [changes], per, tokenizer, channels)


def write_variants(
    path: Path, variants: list[dict], per: str = "token", tokenizer: str | None = None, channels: int = CHANNELS
) -> Path:
    """Write a file with one variant per dict of changes to the metadata."""
    made = []
    blob, table = stored(weights(channels))
    for changes in variants:
        given = {"output": Output(per, channels), "workspace_per_tile": 64 * channels, "weights": table, **changes}
        metadata = replace(METADATA, **given)
        padded = metadata.convention == "padded"
        made.append((padded_executable(channels) if padded else executable(channels, per, metadata.entry), metadata))
    write_module(made, blob, tokenizer, path)
    return path


WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "man",
    "plays",
    "guitar",
    "music",
    "on",
    "stage",
    "runs",
    "fast",
    "slow",
    "in",
    "park",
    "red",
    "blue",
    "house",
    "##s",
    "##ing",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?"]


def tokenizer_json() -> str:
    """A BERT tokenizer with a vocabulary of 28 entries."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer.to_str()
