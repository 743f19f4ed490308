import math

import numpy as np
import pytest
from tvm import relax, tirx

from whet.passes import dialect
from whet.passes.interpret import CHUNK_TOKENS, interpret, pack_requests

C = 8


def build(body, channels=C, rows=20):
    """A module whose main is ``body(embeddings, segments)`` after an embedding with seeded tables."""
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((rows, channels), dtype=np.float32) for rows in (rows, 2000, 2)]
    gamma, beta = rng.standard_normal((2, channels), dtype=np.float32)
    builder = relax.BlockBuilder()
    tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
    inputs = [relax.Var(name, relax.TensorType((tiles, 16), "int32")) for name in ("ids", "positions", "token_types")]
    segments = relax.Var("segments", relax.TensorType((groups, 16, 2), "int32"))
    with builder.function("main", [*inputs, segments]):
        with builder.dataflow():
            constants = [relax.const(value) for value in (*tables, gamma, beta)]
            x = builder.emit(dialect.embed(*inputs, *constants, eps=1e-5), name_hint="embeddings")
            output = builder.emit_output(body(builder, x, segments))
        builder.emit_func_output(output)
    return builder.get(), tables, gamma, beta


def expected_embeddings(ids, types, tables, gamma, beta):
    x = tables[0][ids] + tables[1][np.arange(len(ids))] + tables[2][types]
    x = x.astype(np.float64)
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * gamma + beta


def test_embed_uses_ids_positions_and_token_types():
    module, *tables = build(lambda builder, x, segments: x)
    ids, types = [np.array([3, 1, 19]), np.array([7])], [np.array([0, 1, 1]), np.array([1])]
    expected = np.concatenate([expected_embeddings(i, t, *tables) for i, t in zip(ids, types, strict=True)])
    np.testing.assert_allclose(interpret(module, ids, types), expected, atol=2e-6)
    without = np.concatenate([expected_embeddings(i, np.zeros_like(i), *tables) for i in ids])
    np.testing.assert_allclose(interpret(module, ids), without, atol=2e-6)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_alone_and_in_dense(kind):
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((5, C), dtype=np.float32), rng.standard_normal(5, dtype=np.float32)
    reference = np.vectorize(ACTIVATIONS[kind])
    ids = [np.arange(20)]
    base, *_ = build(lambda builder, x, segments: x)
    x = interpret(base, ids)

    alone, *_ = build(lambda builder, x, segments: dialect.activate(x, kind=kind))
    np.testing.assert_allclose(interpret(alone, ids), reference(x.astype(np.float64)), atol=1e-6)

    def body(builder, x, segments):
        return dialect.dense(x, relax.const(weight), relax.const(bias), activation=kind)

    y = x.astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(interpret(build(body)[0], ids), reference(y), atol=5e-6)


def test_dense_adds_the_residual_after_the_activation():
    weight = np.random.default_rng(1).standard_normal((C, C), dtype=np.float32)

    def body(builder, x, segments):
        return dialect.dense(x, relax.const(weight), relax.const(np.zeros(C, np.float32)), x, activation="relu")

    x = interpret(build(lambda builder, x, segments: x)[0], [np.arange(20)])
    np.testing.assert_allclose(interpret(build(body)[0], [np.arange(20)]), np.maximum(x @ weight.T, 0) + x, atol=1e-5)


def attention_reference(x, lengths, heads, scale):
    """One score at a time."""
    out, start = np.zeros_like(x), 0
    size = x.shape[1] // heads
    for length in lengths:
        for head in range(heads):
            part = x[start : start + length, head * size : (head + 1) * size]
            for i in range(length):
                p = np.exp([scale * part[i] @ part[j] for j in range(length)])
                out[start + i, head * size : (head + 1) * size] = p @ part / p.sum()
        start += length
    return out


@pytest.mark.parametrize("fused", [False, True])
def test_attention_stays_within_requests(fused):
    def body(builder, x, segments):
        if fused:
            qkv = builder.emit(dialect.stack(x, x, x))
            return dialect.self_attention(qkv, segments, heads=2, scale=0.3)
        return dialect.attention(x, x, x, segments, heads=2, scale=0.3)

    rng = np.random.default_rng(2)
    ids = [rng.integers(0, 20, n) for n in (1, 17, 5, 33)]
    x = interpret(build(lambda builder, x, segments: x)[0], ids).astype(np.float64)
    expected = attention_reference(x, [len(i) for i in ids], 2, 0.3)
    np.testing.assert_allclose(interpret(build(body)[0], ids), expected, atol=5e-6)


@pytest.mark.parametrize(("mode", "reduce"), [("mean", np.mean), ("max", np.max), ("cls", lambda x, axis: x[0])])
def test_pool_gives_a_row_per_request_and_zeros_for_empty_ones(mode, reduce):
    ids = [np.arange(5), np.array([], np.int64), np.arange(17)]
    x = interpret(build(lambda builder, x, segments: x)[0], ids)
    pooled = interpret(build(lambda builder, x, segments: dialect.pool(x, segments, mode=mode))[0], ids)
    expected = np.stack([reduce(x[:5], axis=0), np.zeros(C), reduce(x[5:], axis=0)])
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_add_layer_norm_and_normalize():
    gamma, beta = np.random.default_rng(3).standard_normal((2, C), dtype=np.float32)

    def body(builder, x, segments):
        total = builder.emit(dialect.add(x, x))
        normal = builder.emit(dialect.layer_norm(total, relax.const(gamma), relax.const(beta), eps=1e-3))
        return dialect.normalize(normal)

    x = 2 * interpret(build(lambda builder, x, segments: x)[0], [np.arange(9)]).astype(np.float64)
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3) * gamma + beta
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    np.testing.assert_allclose(interpret(build(body)[0], [np.arange(9)]), y, atol=1e-6)


def test_normalize_leaves_zeros():
    def body(builder, x, segments):
        zero = relax.const(np.zeros((4, C), np.float32)), relax.const(np.zeros(4, np.float32))
        return dialect.normalize(builder.emit(dialect.dense(x, *zero)))

    assert not interpret(build(body)[0], [np.arange(3)]).any()


def test_quantized_weight_is_integers_times_row_scales():
    rng = np.random.default_rng(4)
    values, scale = rng.integers(-127, 128, (6, C)).astype(np.int8), rng.random(6, dtype=np.float32)

    def body(builder, x, segments):
        weight = builder.emit(dialect.quantized_weight(relax.const(values), relax.const(scale)))
        return dialect.dense(x, weight, relax.const(np.zeros(6, np.float32)))

    x = interpret(build(lambda builder, x, segments: x)[0], [np.arange(9)])
    expected = x.astype(np.float64) @ (values * scale[:, None]).T
    np.testing.assert_allclose(interpret(build(body)[0], [np.arange(9)]), expected, atol=2e-4)


def test_chunks_do_not_change_the_answer_and_observe_sees_every_row():
    def body(builder, x, segments):
        mixed = builder.emit(dialect.attention(x, x, x, segments, heads=2, scale=1.0), name_hint="context")
        return builder.emit(dialect.pool(mixed, segments, mode="mean"), name_hint="pooled")

    module, *_ = build(body)
    rng = np.random.default_rng(5)
    lengths = [CHUNK_TOKENS + 7, 3, *[100] * 25, 1]
    ids = [rng.integers(0, 20, n) for n in lengths]
    seen = {}
    together = interpret(module, ids, observe=lambda name, rows: seen.setdefault(name, []).append(rows))
    alone = np.concatenate([interpret(module, [one]) for one in ids])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert list(seen) == ["embeddings", "context", "pooled"]
    assert len(seen["context"]) > 2
    assert sum(len(rows) for rows in seen["context"]) == sum(lengths)
    np.testing.assert_array_equal(np.concatenate(seen["pooled"]), together)


def test_pack_requests():
    packed = pack_requests([np.array([5, 6]), np.array([7])], [np.array([0, 1]), np.array([1])])
    assert packed.ids.tolist() == [5, 6, 7]
    assert packed.positions.tolist() == [0, 1, 0]
    assert packed.token_types.tolist() == [0, 1, 1]
    assert packed.segments == [(0, 2), (2, 1)]
    assert packed.ids.dtype == packed.positions.dtype == packed.token_types.dtype == np.int32
    with pytest.raises(ValueError, match="same lengths"):
        pack_requests([np.array([5, 6])], [np.array([0])])


@pytest.mark.parametrize(
    ("ids", "types", "message"),
    [
        ([], None, "ids_list is empty"),
        ([[20]], None, "token id 20 is outside the table of 20 rows"),
        ([[-1]], None, "token id -1"),
        ([[1]], [[2]], "token type 2"),
        ([np.zeros(2001, np.int64)], None, "position 2000"),
    ],
)
def test_bad_requests_are_named(ids, types, message):
    module, *_ = build(lambda builder, x, segments: x)
    with pytest.raises(ValueError, match=message):
        interpret(module, [np.array(i) for i in ids], types and [np.array(t) for t in types])


def test_ops_outside_the_dialect_are_named():
    module, *_ = build(lambda builder, x, segments: relax.op.nn.relu(x))
    with pytest.raises(ValueError, match=r"relax\.nn\.relu is not an op of the encoder dialect"):
        interpret(module, [np.arange(3)])
