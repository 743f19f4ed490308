"""Layers that run on first tokens only: which they are, and that answers keep their bits."""

import numpy as np
import pytest
import tvm
from classifiers import BATCH, CHANNELS, LABELS, LAYERS, classifier, exits, lowered
from execute import program, run
from graphs import Builder, build, encoder_layer, ops, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.fuse_activations import fuse_activations
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.fuse_residuals import fuse_residuals
from whet.passes.graph import Graph, is_call
from whet.passes.hoist_pooling import hoist_pooling
from whet.passes.interpret import interpret
from whet.passes.lower import lower
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig, quantise
from whet.progress import Silent
from whet.runtime.cpu import cpu_flags, request_amx
from whet.schedules.isa import BF16_ISAS, isa

ISA = isa("avx2")


def first(b: Builder, x: relax.Var, name: str) -> relax.Var:
    return b.emit(dialect.pool(x, b.segments, mode="cls"), name)


def test_the_context_and_the_residual_are_pooled():
    def layer(b: Builder, early: bool) -> relax.Var:
        h = b.embed(8)
        norm = [relax.const(np.ones(8, np.float32)), relax.const(np.zeros(8, np.float32))]
        qkv = b.dense(h, 24, "qkv")
        only = {"first_only": True} if early else {}
        x = b.emit(dialect.self_attention(qkv, b.segments, heads=2, scale=0.5, **only), "context")
        if early:
            x, h = first(b, x, "context_first"), first(b, h, "embeddings_first")
        out = b.emit(dialect.dense(x, b.const(8, 8), b.const(8), h), "out")
        h = b.emit(dialect.layer_norm(out, *norm, eps=1e-5), "norm")
        up = b.dense(h, 16, "up", activation="gelu")
        h = b.emit(dialect.dense(up, b.const(8, 16), b.const(8), h), "down")
        return b.dense(h if early else first(b, h, "pooled"), 3, "head")

    before = build(lambda b: layer(b, early=False))
    after = hoist_pooling(before)
    tvm.ir.assert_structural_equal(after, build(lambda b: layer(b, early=True)))
    np.testing.assert_allclose(interpret(after, BATCH), interpret(before, BATCH), atol=1e-6)


@pytest.mark.parametrize("reader", ["mean", "attention", "result"])
def test_what_others_read_is_computed_of_all_tokens(reader: str):
    def write(b: Builder) -> relax.Var:
        h = b.dense(b.embed(8), 8, "shared")
        pooled = first(b, b.emit(dialect.activate(h, kind="relu"), "relu"), "pooled")
        if reader == "mean":
            return b.emit(dialect.add(pooled, b.emit(dialect.pool(h, b.segments, mode="mean"), "mean")), "sum")
        if reader == "attention":
            context = b.emit(dialect.self_attention(b.dense(h, 24, "qkv"), b.segments, heads=2, scale=0.5), "context")
            return b.emit(dialect.add(pooled, first(b, context, "other")), "sum")
        return h

    after = hoist_pooling(build(write))
    shared = next(b.var for b in Graph(after).bindings if b.var.name == "shared")
    assert shared.ty.shape[0].same_as(Graph(after).params[0].ty.shape[0])
    if reader != "result":
        assert ops(after).index("pool") < ops(after).index("activate")
    np.testing.assert_allclose(interpret(after, BATCH), interpret(build(write), BATCH), atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_other_pooling_stays(mode: str):
    module = build(lambda b: b.emit(dialect.pool(b.dense(b.embed(8), 8, "h"), b.segments, mode=mode), "pooled"))
    tvm.ir.assert_structural_equal(hoist_pooling(module), module)


def test_without_tokens_to_spare_nothing_changes():
    module = build(lambda b: b.dense(first(b, b.embed(8), "pooled"), 8, "head"))
    tvm.ir.assert_structural_equal(hoist_pooling(module), module)


def both(monkeypatch: pytest.MonkeyPatch, precision: str, **options):
    """The classifier with and without the pass, to call."""
    after = lowered(precision, **options)
    monkeypatch.setattr("whet.passes.pipeline.hoist_pooling", lambda module: module)
    before = lowered(precision, **options)
    for of, expected in ((after, 2), (before, 1)):
        assert str(of.module.script(show_meta=False)).count("R.call_tir(cls.first_tokens") == expected
    return program(after, ISA), program(before, ISA)


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("per_token", {}),
        ("static", {"sparsity": 0.75}),
        ("per_token", {"sparsity": 0.75, "freeze": True, "memo": True}),
    ],
)
def test_answers_keep_their_bits(monkeypatch, precision, options):
    """A token's sums are added in the same order wherever it stands, in integers and in floats."""
    after, before = both(monkeypatch, precision, **options)
    every = requests(*range(1, 65))
    for batches in ([r] for r in every), (every[i : i + n] for i, n in enumerate(range(2, 40, 3))), [BATCH, every]:
        for some in batches:
            np.testing.assert_array_equal(after(some, True), before(some, True))
    if "freeze" in options:
        for numbers, left in ((exits(), {0, 2}), (exits(after2=2.0), {0, LAYERS}), (exits(after0=2.0), {2})):
            got = after(BATCH, True, exits=numbers)
            assert set(got[:, LABELS]) >= left
            np.testing.assert_array_equal(got, before(BATCH, True, exits=numbers))


def test_scaled_channels_are_taken_as_they_were_rounded():
    """Behind attention there is nothing but its integers, which it scales itself."""

    def write(b: Builder) -> relax.Var:
        context = b.emit(
            dialect.self_attention(b.dense(b.embed(CHANNELS), 3 * CHANNELS, "qkv"), b.segments, heads=2, scale=0.2),
            "context",
        )
        wide = b.dense(b.dense(context, 64, "up", activation="gelu"), 64, "wide")
        factors = relax.const(b.random.uniform(0.1, 1, 64).astype(np.float32))
        return first(b, b.dense(b.emit(dialect.scale_channels(wide, factors), "scaled"), 64, "down"), "pooled")

    module = quantise(build(write), QuantisationConfig("static"), BATCH)
    after, before = (run(lower(m, ISA, max_length=64), ISA, BATCH, True) for m in (hoist_pooling(module), module))
    np.testing.assert_array_equal(after, before)


def test_bfloat16_pairs_are_pooled():
    batch = requests(7, 1, 33, 16)

    def write(b: Builder) -> relax.Var:
        return first(b, encoder_layer(b, 64, 2, 128), "pooled")

    options = Options(tuple(BF16_ISAS.values()), max_length=64, quantisation=None, bf16=True)
    for variant, target in zip(run_pipeline(build(write), options, [], [], Silent()), options.isas, strict=True):
        script = str(variant.lowered.module.script(show_meta=False))
        assert script.count("R.call_tir(cls.first_tokens") == 2 and "def quantize" not in script
        if not cpu_flags().issuperset(target.cpu_flags) or (target.has_amx and request_amx()):
            continue
        answer = program(variant.lowered, target)
        whole = run_pipeline(
            build(lambda b: encoder_layer(b, 64, 2, 128)),
            Options((target,), max_length=64, quantisation=None, bf16=True),
            [],
            [],
            Silent(),
        )[0]
        rows = program(whole.lowered, target)(batch, False)
        starts = np.cumsum([0, *map(len, batch)])[:-1]
        np.testing.assert_array_equal(answer(batch, True), rows[starts])


def test_the_layer_before_the_pool_is_seen_by_no_other_token():
    module = fuse_residuals(fuse_activations(fuse_qkv(build(classifier))))
    graph = Graph(hoist_pooling(module))
    per_request = [
        b.var.name
        for b in graph.bindings
        if is_call(b.value, dialect.DENSE) and b.var.ty.shape[0].same_as(graph.params[3].ty.shape[0])
    ]
    last = LAYERS - 1
    assert per_request == [f"out{last}", f"up{last}", f"down{last}", "pooler", "logits"]
