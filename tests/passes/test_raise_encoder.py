"""The rules and what they emit, without a file format: graphs are written as calls of the rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from whet.passes import dialect
from whet.passes.raise_encoder import raise_encoder
from whet.passes.raise_facts import (
    CURVES,
    GRID,
    Integers,
    Known,
    Matrix,
    NotAnEncoder,
    Probes,
    Tokens,
    activation_of,
    affine_of,
    erf,
    reshape,
    transpose,
)
from whet.passes.raise_rules import Rules

C, HEADS, ROWS = 12, 3, 20
RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def const(values: object) -> Known:
    return Known((np.asarray(values, np.float32),))


WORD, POSITION, GAMMA, BETA = array(ROWS, C), array(ROWS, C), array(C), array(C)


@pytest.fixture
def rules() -> Rules:
    return Rules(Probes.of())


def lookup(rules: Rules, table: np.ndarray, index: Known) -> Tokens:
    rows = rules.lookup(const(table), index)
    assert rows is not None
    return rows


def hidden(rules: Rules) -> Tokens:
    """Embeddings and their layer norm."""
    total = rules.add(
        lookup(rules, WORD, Known(rules.probes.ids)), lookup(rules, POSITION, Known(rules.probes.positions))
    )
    return rules.layer_norm(total, const(GAMMA), const(BETA), 1e-6)


def heads(rules: Rules, x: object) -> Tokens:
    """(batch, token, channel) to (batch, head, token, head size)."""
    shapes = [
        (b, s, HEADS, C // HEADS) for b, s in zip(rules.probes.batch.sizes, rules.probes.token.sizes, strict=True)
    ]
    assert isinstance(x, Tokens)
    return transpose(reshape(x, (shapes[0], shapes[1])), [0, 2, 1, 3])


def merged(rules: Rules, x: Tokens) -> Tokens:
    x = transpose(x, [0, 2, 1, 3])
    shapes = [(b, s, C) for b, s in zip(rules.probes.batch.sizes, rules.probes.token.sizes, strict=True)]
    return reshape(x, (shapes[0], shapes[1]))


def expected(build: object) -> tvm.IRModule:
    """A dialect function: ``build(embedded, segments)`` gives the calls after the embeddings."""
    tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
    ids, positions, types = (
        relax.Var(n, relax.TensorType((tiles, 16), "int32")) for n in ("ids", "positions", "token_types")
    )
    segments = relax.Var("segments", relax.TensorType((groups, 16, 2), "int32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, positions, types, segments]):
        with builder.dataflow():
            tables = (relax.const(WORD), relax.const(POSITION), relax.const(np.zeros((1, C), np.float32)))
            norm = (relax.const(GAMMA), relax.const(BETA))
            x = builder.emit(dialect.embed(ids, positions, types, *tables, *norm, eps=1e-6))
            result = builder.emit_output(builder.emit(build(builder, x, segments)))  # type: ignore[operator]
        builder.emit_func_output(result)
    return builder.get()


def mask_bias(rules: Rules, low: float) -> Known:
    arrays = [np.where(m == 1, 0.0, low)[:, None, None, :].astype(np.float32) for m in rules.probes.mask]
    return Known((arrays[0], arrays[1]))


@pytest.mark.parametrize("low", [-10000.0, np.finfo(np.float32).min, -np.inf])
@pytest.mark.parametrize("place", ["scores", "query", "both"])
def test_attention_block(rules: Rules, low: float, place: str) -> None:
    weights, biases = [array(C, C) for _ in range(3)], [array(C) for _ in range(3)]
    scale = 1 / math.sqrt(C // HEADS)

    x = hidden(rules)
    q, k, v = (
        heads(rules, rules.add(rules.matmul(x, const(w.T)), const(b))) for w, b in zip(weights, biases, strict=True)
    )
    k = transpose(k, [0, 1, 3, 2])
    if place == "query":
        q = rules.mul(q, const(scale))
    elif place == "both":
        q, k = rules.mul(q, const(math.sqrt(scale))), rules.mul(k, const(math.sqrt(scale)))
    scores = rules.matmul(q, k)
    if place == "scores":
        scores = rules.div(scores, const(1 / scale))
    probabilities = rules.softmax(rules.add(scores, mask_bias(rules, low)), -1)
    output = rules.add(merged(rules, rules.matmul(probabilities, v)), x)
    found = raise_encoder(rules, [output])

    def build(builder: relax.BlockBuilder, x: relax.Var, segments: relax.Var) -> relax.Expr:
        q, k, v = (
            builder.emit(dialect.dense(x, relax.const(w), relax.const(b))) for w, b in zip(weights, biases, strict=True)
        )
        context = builder.emit(dialect.attention(q, k, v, segments, heads=HEADS, scale=scale))
        return dialect.add(context, x)

    if place == "scores":
        tvm.ir.assert_structural_equal(found.module, expected(build))
    attention = next(b.value for b in found.module["main"].body.blocks[0].bindings if "attention" in str(b.value))
    assert math.isclose(attention.attrs["scale"], scale, rel_tol=1e-6)
    assert not rules.notes
    assert (found.per_request, found.vocab_size, found.max_length) == (False, ROWS, ROWS)


def test_what_is_no_mask_is_refused(rules: Rules) -> None:
    x = heads(rules, hidden(rules))
    scores = rules.matmul(x, transpose(x, [0, 1, 3, 2]))
    lengths = rules.probes.token.sizes
    causal = Known(tuple(np.triu(np.full((n, n), -np.inf), 1) for n in lengths))
    with pytest.raises(NotAnEncoder, match="not a padding mask"):
        rules.add(scores, causal)
    with pytest.raises(NotAnEncoder, match="not a padding mask"):
        rules.add(scores, mask_bias(rules, -3.0))
    reach = Known(tuple(np.abs(np.subtract.outer(np.arange(n), np.arange(n))) * -0.1 for n in lengths))
    with pytest.raises(NotAnEncoder, match="not a padding mask"):
        rules.add(scores, reach)


def test_unmasked_attention_is_noted(rules: Rules) -> None:
    x = heads(rules, hidden(rules))
    rules.matmul(rules.softmax(rules.matmul(x, transpose(x, [0, 1, 3, 2])), -1), x)
    assert "does not mask padding" in rules.notes[0]


@pytest.mark.parametrize("variant", ["pow", "mul", "reciprocal"])
def test_decomposed_layer_norm(rules: Rules, variant: str) -> None:
    gamma, beta = array(C), array(C)
    x = hidden(rules)
    centred = rules.sub(x, rules.reduce(x, "mean", [-1], keep=True))
    square = rules.mul(centred, centred) if variant == "mul" else rules.power(centred, const(2))
    deviation = rules.unary(rules.add(rules.reduce(square, "mean", [-1], keep=True), const(1e-5)), np.sqrt, "Sqrt")
    if variant == "reciprocal":
        normed = rules.mul(centred, rules.unary(deviation, np.reciprocal, "Reciprocal"))
    else:
        normed = rules.div(centred, deviation)
    found = raise_encoder(rules, [rules.add(rules.mul(normed, const(gamma)), const(beta))])
    want = expected(
        lambda builder, x, segments: dialect.layer_norm(
            x, relax.const(gamma), relax.const(beta), eps=float(np.float32(1e-5))
        )
    )
    tvm.ir.assert_structural_equal(found.module, want)


def gelu_variants() -> dict[str, object]:
    half, one, root = const(0.5), const(1), const(math.sqrt(2))
    inner = const(math.sqrt(2 / math.pi))

    def erf_form(r: Rules, x: Tokens, order: int) -> object:
        tail = r.add(r.unary(r.div(x, root), erf, "Erf"), one)
        return (
            r.mul(r.mul(x, half), tail),
            r.mul(r.mul(x, tail), half),
            r.mul(x, r.mul(tail, half)),
        )[order]

    def tanh_form(r: Rules, x: Tokens, cube: bool) -> object:
        third = r.mul(x, r.mul(x, x)) if cube else r.power(x, const(3))
        tail = r.unary(r.mul(r.add(x, r.mul(third, const(0.044715))), inner), np.tanh, "Tanh")
        return r.mul(r.mul(half, x), r.add(tail, one))

    return {
        "erf0 gelu": lambda r, x: erf_form(r, x, 0),
        "erf1 gelu": lambda r, x: erf_form(r, x, 1),
        "erf2 gelu": lambda r, x: erf_form(r, x, 2),
        "pow gelu_tanh": lambda r, x: tanh_form(r, x, False),
        "cube gelu_tanh": lambda r, x: tanh_form(r, x, True),
        "max relu": lambda r, x: r.clip(x, const(0), None),
        "tanh tanh": lambda r, x: r.unary(x, np.tanh, "Tanh"),
    }


@pytest.mark.parametrize("variant", gelu_variants())
def test_activations_however_they_are_spelled(rules: Rules, variant: str) -> None:
    weight, bias = array(8, C), array(8)
    x = rules.add(rules.linear(hidden(rules), const(weight), transposed=True), const(bias))
    found = raise_encoder(rules, [gelu_variants()[variant](rules, x)])  # type: ignore[operator]
    want = expected(
        lambda builder, x, segments: dialect.dense(
            x,
            relax.const(weight),
            relax.const(bias),
            activation=variant.split()[1],  # type: ignore[arg-type]
        )
    )
    tvm.ir.assert_structural_equal(found.module, want)


def test_other_functions_are_refused(rules: Rules) -> None:
    x = rules.linear(hidden(rules), const(array(8, C)), transposed=True)
    with pytest.raises(NotAnEncoder, match="none of gelu"):
        rules.settle(rules.mul(x, rules.unary(x, lambda v: 1 / (1 + np.exp(-v)), "Sigmoid")))
    assert activation_of(np.maximum(GRID, 0.01 * GRID)) is None
    assert affine_of(3 * GRID - 1) == (3.0, -1.0)
    assert activation_of(CURVES["gelu"] + 1e-3) is None


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling(rules: Rules, mode: str) -> None:
    x, mask = hidden(rules), Known(rules.probes.mask)
    wide = Known(tuple(m[..., None].astype(np.float32) for m in rules.probes.mask))
    if mode == "mean":
        counts = Known(tuple(m.sum(1, keepdims=True).astype(np.float32) for m in rules.probes.mask))
        pooled = rules.div(rules.reduce(rules.mul(x, wide), "sum", [1], keep=False), counts)
    elif mode == "cls":
        pooled = rules.take(x, 1, [np.array(0), np.array(0)])
    else:
        keep = Known(tuple(m[..., None] == 1 for m in mask.values))
        pooled = rules.reduce(rules.where(keep, x, const(-1e9)), "max", [1], keep=False)
    found = raise_encoder(rules, [rules.div(pooled, rules.reduce(pooled, "l2", [-1], keep=True))])

    def build(builder: relax.BlockBuilder, x: relax.Var, segments: relax.Var) -> relax.Expr:
        return dialect.normalize(builder.emit(dialect.pool(x, segments, mode=mode)))  # type: ignore[arg-type]

    assert found.per_request
    tvm.ir.assert_structural_equal(found.module, expected(build))


def test_pooling_by_other_weights_is_refused(rules: Rules) -> None:
    last = [np.asarray(n - 1) for n in rules.probes.token.sizes]
    with pytest.raises(NotAnEncoder, match="neither mean, first token nor maximum"):
        rules.settle(rules.take(hidden(rules), 1, last))


def test_slices_of_a_fused_projection(rules: Rules) -> None:
    weight = array(3 * C, C)
    qkv = rules.linear(hidden(rules), const(weight), transposed=True)
    shapes = [(b, s, 3, C) for b, s in zip(rules.probes.batch.sizes, rules.probes.token.sizes, strict=True)]
    by_axis = rules.take(reshape(qkv, (shapes[0], shapes[1])), 2, [np.array(1), np.array(1)])
    by_range = rules.take(qkv, -1, [np.arange(C, 2 * C)] * 2)
    want = expected(
        lambda builder, x, segments: dialect.dense(
            x, relax.const(weight[C : 2 * C]), relax.const(np.zeros(C, np.float32))
        )
    )
    for found in (by_axis, by_range):
        tvm.ir.assert_structural_equal(raise_encoder(rules, [found]).module, want)


def test_start_and_end_become_one_layer(rules: Rules) -> None:
    weight, bias = array(2, C), array(2)
    both = rules.add(rules.linear(hidden(rules), const(weight), transposed=True), const(bias))
    start, end = (rules.take(both, -1, [np.array(i), np.array(i)]) for i in range(2))
    want = expected(lambda builder, x, segments: dialect.dense(x, relax.const(weight), relax.const(bias)))
    tvm.ir.assert_structural_equal(raise_encoder(rules, [start, end]).module, want)


def test_positions_may_start_later_and_lookups_must_mean_something(rules: Rules) -> None:
    shifted = Known(tuple(p + 2 for p in rules.probes.positions))
    total = rules.add(lookup(rules, WORD, Known(rules.probes.ids)), lookup(rules, POSITION, shifted))
    assert raise_encoder(rules, [rules.layer_norm(total, const(GAMMA), const(BETA), 1e-6)]).max_length == ROWS - 2
    assert rules.lookup(const(WORD), Known(tuple(ids + 1 for ids in rules.probes.ids))) is None
    buckets = Known(tuple(np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in rules.probes.token.sizes))
    assert rules.lookup(const(WORD), buckets) is None


def test_quantised_weights_keep_integers_and_scales() -> None:
    integers, scale = RNG.integers(-127, 128, (4, 6)), array(1, 6)
    known = Known(((integers * scale).astype(np.float32),), Integers(integers, scale))
    matrix, why = Matrix.of(known, "w", transpose=True)
    assert not why
    assert matrix.values.dtype == np.int8
    assert np.array_equal(matrix.values, integers.T)
    assert np.array_equal(matrix.scale, scale[0])  # type: ignore[arg-type]
    wide = Known(known.values, Integers(integers + 100, scale))
    dense, why = Matrix.of(wide, "w", transpose=True)
    assert dense.scale is None
    assert "more than int8" in why
    by_input, why = Matrix.of(known, "w", transpose=False)
    assert by_input.scale is None
    assert "per input channel" in why


def test_a_shifted_table_differs_by_a_constant_per_row() -> None:
    integers = RNG.integers(-151, 104, (50, 6))
    matrix, why = Matrix.table(Known((integers * 0.5,), Integers(integers, np.float32(0.5))), "table")
    assert not why
    assert matrix.values.dtype == np.int8
    assert np.ptp(matrix.dense() - integers * 0.5) < 1e-6


def test_reshape_splits_and_joins_channels(rules: Rules) -> None:
    x = hidden(rules)
    again = merged(rules, heads(rules, x))
    assert [again.shape(p) for p in (0, 1)] == [x.shape(p) for p in (0, 1)]
    with pytest.raises(NotAnEncoder, match="reshapes"):
        reshape(x, ((3, 13, C - 2, 1), (5, 11, C - 2, 1)))
    batches, lengths = rules.probes.batch.sizes, rules.probes.token.sizes
    with pytest.raises(NotAnEncoder, match="reshapes"):
        reshape(x, tuple((s, b, C) for b, s in zip(batches, lengths, strict=True)))  # type: ignore[arg-type]


def test_a_graph_without_embeddings_or_with_two_is_refused(rules: Rules) -> None:
    rows = lookup(rules, WORD, Known(rules.probes.ids))
    with pytest.raises(NotAnEncoder, match="no layer norm follows"):
        raise_encoder(rules, [rows])
    with pytest.raises(NotAnEncoder, match="no position embeddings"):
        raise_encoder(rules, [rules.layer_norm(rows, const(GAMMA), const(BETA), 1e-6)])
    with pytest.raises(NotAnEncoder, match="2 embedding layers"):
        raise_encoder(rules, [rules.add(hidden(rules), hidden(rules))])
