"""What a cache says of each request, against NumPy; its place in the batch must not matter."""

import numpy as np
import oracles
import pytest

from whet.schedules.cache_lookup import LookupSpec, lookup, pack_rows

LENGTHS = [1, 2, 15, 16, 17, 31, 3, 64, 100, 5, 1, 1, 8, 8, 8, 9, 40, 7]
SPECS = [
    LookupSpec(20, 9, 2, "perceptron"),
    LookupSpec(384, 128, 150, "perceptron"),
    LookupSpec(36, 77, 5, "clusters"),
]


def world(spec, seed=0):
    """Hidden states ``(tokens, C)`` and the numbers of a cache."""
    rng = np.random.default_rng(seed)

    def floats(*shape, low=-1.0, high=1.0):
        return rng.uniform(low, high, shape).astype("float32")

    def ints(*shape):
        return rng.integers(-127, 128, shape).astype("int8")

    rows = ints(spec.rows, spec.channels)
    scale, row_scale = floats(spec.channels, low=0.5), floats(spec.rows, low=0.01, high=0.02)
    if spec.kind == "clusters":
        bias = (-0.5 * ((rows * row_scale[:, None]) ** 2).sum(1)).astype("float32")
        more = [ints(spec.rows, spec.outputs), floats(spec.rows), floats(spec.rows, low=0.01)]
    else:
        bias = floats(spec.rows)
        more = [ints(spec.outputs, spec.rows), floats(spec.outputs, low=1e-4, high=1e-3), floats(spec.outputs)]
    return (
        floats(sum(LENGTHS), spec.channels, low=-2, high=2),
        (scale, floats(spec.channels)),
        (rows, row_scale, bias),
        more,
    )


def expected(spec, x, standard, rows, more):
    """Answer ``(outputs,)`` and trust of one request with the hidden states x, in float64."""
    z = x.astype("float64").mean(0) * standard[0] + standard[1]
    scores = (rows[0].astype("float64") * rows[1][:, None]) @ z + rows[2]
    if spec.kind == "perceptron":
        logits = (more[0].astype("float64") * more[1][:, None]) @ np.maximum(scores, 0) + more[2]
        *_, second, largest = np.sort(np.exp(logits - logits.max()))
        return logits, (largest - second) / np.exp(logits - logits.max()).sum()
    answers, answer_scale, inverse_reach = more
    centroids = rows[0].astype("float64") * rows[1][:, None]
    distances = ((z - centroids) ** 2).sum(1)
    best = distances.argmin()
    return answers[best] * answer_scale[best].astype("float64"), 1 - distances[best] * inverse_reach[best]


def run(isa, spec, x, segments, standard, rows, more):
    kernel = oracles.build(lookup, spec, isa)
    packed = pack_rows(*more) if spec.kind == "perceptron" else more
    inputs = [oracles.to_tiles(x), segments, *standard, *pack_rows(*rows), *packed]
    shapes = [(len(segments), spec.outputs, 16), (len(segments), 16)]
    answer, trust = oracles.run(kernel, inputs, [(shape, "float32") for shape in shapes])
    return oracles.from_tiles(answer), trust.reshape(-1)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.rows}")
def test_lookup(isa, spec):
    x, *cache = world(spec)
    segments = oracles.segments_of(LENGTHS, gaps=[0, 4])
    answer, trust = run(isa, spec, oracles.fill_last_tile(x), segments, *cache)
    for i, tokens in oracles.requests_of(segments):
        wanted = expected(spec, x[tokens], *cache)
        np.testing.assert_allclose(answer[i], wanted[0], atol=2e-4)
        np.testing.assert_allclose(trust[i], wanted[1], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.rows}")
def test_request_alone_gives_the_same_bits_on_every_instruction_set(isa, spec):
    x, *cache = world(spec)
    together = run(isa, spec, x, oracles.segments_of(LENGTHS), *cache)
    for i, tokens in oracles.requests_of(oracles.segments_of(LENGTHS)):
        alone = run("avx2", spec, x[tokens], oracles.segments_of([tokens.stop - tokens.start]), *cache)
        np.testing.assert_array_equal(alone[0][0], together[0][i])
        assert alone[1][0] == together[1][i]


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="kind is 'trees'"):
        LookupSpec(8, 3, 3, "trees")
