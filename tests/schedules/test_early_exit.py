"""Who stays, where tokens move, and who is answered by what, against NumPy."""

import numpy as np
import oracles
import pytest

from whet.schedules.early_exit import NOBODY, FollowSpec, MoveSpec, SettleSpec, StaySpec, follow, move, settle, stay

LENGTHS = [1, 2, 15, 16, 17, 31, 3, 64, 100, 5, 1, 1, 8, 8, 8, 9, 40, 7, 16, 16]


def run_stay(isa, trust, segments, threshold, requests=None):
    groups = len(segments)
    kernel = oracles.build(stay, StaySpec(1, 3, requests is not None), isa)
    exits = np.array([[1, 2, 4], [9, threshold, 9]], "float32")
    tiles = -(-int(segments.reshape(-1, 2).sum(1).max()) // 16)
    inputs = [trust.reshape(-1, 16), segments, *([] if requests is None else [requests])]
    outputs = [((groups, 16, 2), "int32"), ((groups, 16), "int32"), ((tiles, 16), "int32"), ((3,), "int32")]
    *found, live = oracles.run(kernel, [*inputs, exits], outputs)
    return [array[:size] for array, size in zip(found, live, strict=True)]


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, 2.0])
@pytest.mark.parametrize("numbered", [False, True])
def test_stay(isa, threshold, numbered):
    rng = np.random.default_rng(0)
    segments = oracles.segments_of(LENGTHS, gaps=[0, 4])
    trust = rng.random(segments.size // 2).astype("float32")
    numbers = rng.permutation(len(trust)).astype("int32").reshape(-1, 16)
    kept, requests, sources = run_stay(isa, trust, segments, threshold, numbers if numbered else None)

    staying = [(i, tokens) for i, tokens in oracles.requests_of(segments) if trust[i] < threshold]
    assert 1 < len(staying) < len(LENGTHS) or threshold in (0.0, 2.0)
    wanted = [numbers.reshape(-1)[i] if numbered else i for i, _ in staying]
    lengths = [t.stop - t.start for _, t in staying]
    assert len(kept) == -(-len(staying) // 16)
    if staying:
        np.testing.assert_array_equal(kept, oracles.segments_of(lengths))
    np.testing.assert_array_equal(requests.reshape(-1)[: len(wanted)], wanted)
    assert (requests.reshape(-1)[len(wanted) :] == NOBODY).all()
    tokens = np.concatenate([np.arange(t.start, t.stop) for _, t in staying] or [np.empty(0, int)])
    np.testing.assert_array_equal(sources.reshape(-1)[: len(tokens)], tokens)
    beyond = sources.reshape(-1)[len(tokens) :]
    if len(beyond):
        np.testing.assert_array_equal(
            beyond, np.minimum(tokens[-1] + 1 + np.arange(len(beyond)), tokens[-1] // 16 * 16 + 15)
        )
    assert len(sources) == -(-len(tokens) // 16)


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("quantize", ["none", "bf16", "static", "per_token"])
def test_move(isa, quantize):
    rng = np.random.default_rng(1)
    tiles, channels = 6, 12
    # A tile that stays whole, one that is shifted, one of single tokens.
    sources = np.stack([np.arange(32, 48), np.arange(50, 66), np.sort(rng.permutation(96)[:16])]).astype("int32")
    forms = [rng.normal(0, 1, (tiles, channels, 16)).astype("float32")]
    if quantize == "bf16":
        forms.append(rng.integers(0, 1 << 16, (tiles, channels // 2, 16, 2)).astype("uint16"))
    if quantize in ("static", "per_token"):
        forms.append(rng.integers(0, 256, (tiles, channels // 4, 16, 4)).astype("uint8"))
    if quantize == "per_token":
        forms.append(rng.normal(0, 1, (tiles, 2, 16)).astype("float32"))
    kernel = oracles.build(move, MoveSpec(channels, quantize), isa)
    found = oracles.run(kernel, [sources, *forms], [((3, *form.shape[1:]), form.dtype) for form in forms])
    for form, moved in zip(forms, found, strict=True):
        for tile, lane in np.ndindex(3, 16):
            source = sources[tile, lane]
            np.testing.assert_array_equal(moved[tile, :, lane], form[source // 16, :, source % 16])


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_follow(isa):
    rng = np.random.default_rng(3)
    records = rng.integers(1, 1 << 62, (3, 16, 2))
    staying = np.sort(rng.permutation(48)[:21])
    numbers = np.full((2, 16), NOBODY, "int32")
    numbers.reshape(-1)[:21] = staying
    kernel = oracles.build(follow, FollowSpec(), isa)
    (out,) = oracles.run(kernel, [numbers, records], [((2, 16, 2), "int64")])
    np.testing.assert_array_equal(out.reshape(-1, 2)[:21], records.reshape(-1, 2)[staying])
    assert not out.reshape(-1, 2)[21:].any()


@pytest.mark.parametrize("isa", oracles.NAMES)
def test_settle(isa):
    rng = np.random.default_rng(2)
    answers = [rng.normal(0, 1, (groups, 5, 16)).astype("float32") for groups in (3, 2, 1)]
    trusts = [rng.random((groups, 16)).astype("float32") for groups in (3, 2)]
    numbers = [np.full((groups, 16), NOBODY, "int32") for groups in (2, 1)]
    second = np.sort(rng.permutation(48)[:20])
    third = second[3:9]
    numbers[0].reshape(-1)[:20], numbers[1].reshape(-1)[:6] = second, third
    kernel = oracles.build(settle, SettleSpec(5, (0, 2, 6)), isa)
    inputs = [answers[0], trusts[0], answers[1], trusts[1], numbers[0], answers[2], numbers[1]]
    (out,) = oracles.run(kernel, inputs, [((3, 7, 16), "float32")])
    first, some, last = (
        np.column_stack([oracles.from_tiles(a), np.full(len(a) * 16, layer), trust.reshape(-1)])
        for a, layer, trust in zip(answers, (0, 2, 6), [*trusts, np.ones((1, 16))], strict=True)
    )
    expected = first
    expected[second] = some[:20]
    expected[third] = last[:6]
    np.testing.assert_array_equal(oracles.from_tiles(out), expected)
