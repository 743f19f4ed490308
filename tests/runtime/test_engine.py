"""Running token ids: masks, splitting, checks, threads, forks, lifetimes."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_module
from tiny_module import CHANNELS, MAX_LENGTH, VOCAB, columns

from whet.runtime import load


@pytest.fixture(scope="module")
def token(modules):
    return load(modules["token"], threads=1)


@pytest.fixture(scope="module")
def request_(modules):
    return load(modules["request"], threads=1)


def batch(rng, rows, width):
    ids = rng.integers(0, VOCAB, (rows, width))
    types = rng.integers(0, 2, (rows, width))
    positions = np.broadcast_to(np.arange(width), ids.shape)
    return ids, types, positions


def masks(rng, rows, width):
    lengths = rng.integers(1, width + 1, rows)
    right = np.arange(width) < lengths[:, None]
    holes = rng.random((rows, width)) < 0.6
    holes[np.arange(rows), rng.integers(0, width, rows)] = True
    return {"right": right, "left": right[:, ::-1], "holes": holes}


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_run_has_the_semantics_of_a_mask(token, request_, kind, rows):
    rng = np.random.default_rng(rows)
    ids, types, positions = batch(rng, rows, 23)
    mask = masks(rng, rows, 23)[kind]
    expected = columns(ids, positions, types) * mask[..., None]
    out = token.run(ids, mask.astype(np.int64), types)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert not out[~mask].any()
    np.testing.assert_allclose(request_.run(ids, mask, types), expected.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_defaults_are_all_kept_and_type_zero(token):
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(token.run(ids), token.run(ids, np.ones_like(ids), np.zeros_like(ids)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, ">i8"])
def test_any_integer_dtype(token, dtype):
    ids = np.arange(12, dtype=dtype).reshape(2, 6)
    np.testing.assert_array_equal(token.run(ids, np.ones_like(ids), np.zeros_like(ids)), token.run(ids.tolist()))


def test_strided_input(token):
    ids = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(token.run(ids[::2, ::-1]), token.run(ids[::2, ::-1].copy()))


def test_answers_do_not_depend_on_neighbours(request_):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, MAX_LENGTH + 1, 60)
    ids = rng.integers(0, VOCAB, lengths.sum())
    together = request_.run_packed(ids, lengths)
    ends = np.cumsum(lengths)
    for i in range(60):
        alone = request_.run_packed(ids[ends[i] - lengths[i] : ends[i]], lengths[i : i + 1])
        np.testing.assert_array_equal(together[i], alone[0])


def test_batches_are_split_into_calls(token, monkeypatch):
    sizes = []
    invoke = type(token)._invoke_packed
    counted = lambda self, ids, *more: sizes.append(len(ids)) or invoke(self, ids, *more)  # noqa: E731
    monkeypatch.setattr(type(token), "_invoke_packed", counted)
    lengths = np.array([MAX_LENGTH, 40, 40, 1, 1, MAX_LENGTH])
    token.run_packed(np.zeros(lengths.sum(), int), lengths)
    assert sizes == [64, 40 + 40 + 1 + 1, 64]


def test_calls_of_one_size_keep_nothing_of_each_other(token):
    rng = np.random.default_rng(5)
    first, second = (rng.integers(0, VOCAB, n) for n in (15, 3))
    before = token.run_packed(first, [9, 6])
    kept = before.copy()
    after = token.run_packed(second, [3])
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(token.run_packed(second, [3]), after)
    np.testing.assert_array_equal(token.run_packed(first, [9, 6]), kept)


def test_run_packed_matches_run(token, request_):
    rng = np.random.default_rng(3)
    lengths = np.array([4, 1, 7])
    ids, types = rng.integers(0, VOCAB, 12), rng.integers(0, 2, 12)
    positions = np.concatenate([np.arange(n) for n in lengths])
    expected = columns(ids, positions, types)
    np.testing.assert_allclose(token.run_packed(ids, lengths, token_types=types), expected, rtol=1e-6)
    shifted = columns(ids, positions + 5, types)
    np.testing.assert_allclose(token.run_packed(ids, lengths, positions + 5, types), shifted, rtol=1e-6)


def test_nothing_in_nothing_out(token, request_):
    empty = np.empty((0, 5), int)
    assert token.run(empty).shape == (0, 5, CHANNELS)
    assert request_.run(empty).shape == (0, CHANNELS)
    assert request_.run_packed([], []).shape == (0, CHANNELS)
    assert token.run_packed([], []).shape == (0, CHANNELS)


ROW = [[1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROW[0],), "input_ids has shape \\(3,\\); expected 2 dimensions"),
        (([ROW],), "input_ids has shape"),
        (([[1.0, 2.0]],), "dtype float64; expected integers"),
        (([["a", "b"]],), "expected integers"),
        (([[1, 2], [3]],), "ragged"),
        (([[1, VOCAB]],), f"input_ids contains {VOCAB}; expected values from 0 to {VOCAB - 1}"),
        (([[1, -1]],), "input_ids contains -1"),
        ((np.array([[2**63]], np.uint64),), "input_ids contains 9223372036854775808"),
        ((np.array([[2**32 + 1]]),), "input_ids contains 4294967297"),
        ((ROW, [[1, 1]]), "attention_mask has shape \\(1, 2\\)"),
        ((ROW, [[1, 1, 2]]), "attention_mask contains 2"),
        ((ROW, [[1.0, 1.0, 1.0]]), "attention_mask has dtype float64"),
        ((ROW, [[0, 0, 0]]), "row 0 is empty"),
        ((ROW, None, [[0, 0, 2]]), "token_type_ids contains 2; expected values from 0 to 1"),
        ((ROW, None, [[0, 0]]), "token_type_ids has shape"),
        ((np.zeros((1, 0), int),), "row 0 is empty"),
        ((np.zeros((1, MAX_LENGTH + 1), int),), f"has {MAX_LENGTH + 1} tokens; this model takes at most {MAX_LENGTH}"),
        (([[1] * 70], [[0] * 69 + [1]]), "a token stands at position 69"),
    ],
)
def test_run_checks_its_input(token, arguments, message):
    with pytest.raises(ValueError, match=message):
        token.run(*arguments)


def test_values_where_the_mask_is_zero_are_not_looked_at(token):
    out = token.run([[1, 2, -100]], [[1, 1, 0]])
    np.testing.assert_array_equal(out[:, :2], token.run([[1, 2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [3]), "lengths sum to 3, there are 2 ids"),
        (([1, 2], [2, 0]), "request 1 has length 0"),
        (([1, 2], [3, -1]), "request 1 has length -1"),
        (([1, 2], [2.0]), "lengths has dtype float64"),
        (([1, 99], [2]), "contains 99"),
        (([1, 2], [2], [0, MAX_LENGTH]), f"position {MAX_LENGTH}"),
        (([1, 2], [2], [-1, 0]), "positions contains -1"),
        (([1, 2], [2], [0]), "positions has shape"),
        (([0] * (MAX_LENGTH + 1), [MAX_LENGTH + 1]), "request 0 has 65 tokens"),
        (([0] * (MAX_LENGTH + 1), [MAX_LENGTH + 1], [0] * (MAX_LENGTH + 1)), "request 0 has 65 tokens"),
    ],
)
def test_run_packed_checks_its_input(token, arguments, message):
    with pytest.raises(ValueError, match=message):
        token.run_packed(*arguments)


def test_padded_convention(modules):
    session = load(modules["padded"], threads=1)
    word = tiny_module.weights()["word"]
    ids = np.arange(12).reshape(2, 6)
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(session.run(ids, mask), word[ids] * mask[..., None])
    np.testing.assert_array_equal(session.run(ids), word[ids])
    np.testing.assert_array_equal(session.run_packed(np.arange(7), [3, 4]), word[np.arange(7)])
    assert session.run(np.empty((0, 4), int)).shape == (0, 4, CHANNELS)
    assert session.run_packed([], []).shape == (0, CHANNELS)
    with pytest.raises(ValueError, match="positions cannot be chosen"):
        session.run_packed([1, 2], [2], [0, 1])
    with pytest.raises(ValueError, match="input_ids contains 50"):
        session.run([[50]])
    with pytest.raises(ValueError, match="the rows have 65 tokens"):
        session.run(np.zeros((2, 65), int))
    np.testing.assert_array_equal(session.run([[1, 99]], [[1, 0]])[0, 0], word[1])


def test_padded_convention_with_two_outputs(tmp_path):
    path = tiny_module.write(
        tmp_path / "qa.so", channels=2, convention="padded", inputs=("input_ids", "attention_mask"),
        task="question_answering",
    )  # fmt: skip
    out = load(path).run([[1, 2, 3]])
    assert out.shape == (1, 3, 2)
    np.testing.assert_array_equal(out[..., 0], -out[..., 1])


def test_padded_convention_with_an_unknown_input(tmp_path):
    path = tiny_module.write(tmp_path / "m.so", convention="padded", inputs=("input_ids", "pixel_values"))
    with pytest.raises(ValueError, match="wants the input 'pixel_values'"):
        load(path).run([[1]])


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_checked(modules, threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; expected at least 1"):
        load(modules["token"], threads)


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))  # noqa: PTH208


def in_thread(function):
    """Run in a thread that has no pool yet."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_threads_are_as_many_as_asked(modules):
    one, two, three = (load(modules["token"], threads=n) for n in (1, 2, 3))
    ids = np.arange(48).reshape(1, 48)

    def count(session):
        before = tasks()
        session.run(ids)
        return len(tasks() - before)

    assert in_thread(lambda: count(one)) == 0
    assert in_thread(lambda: count(two)) == 1
    assert in_thread(lambda: (count(three), count(one), count(two))) == (2, 0, 0)
    # A pool cannot grow: a thread with a bigger one is started once instead.
    added, again = in_thread(lambda: (count(two), count(three), count(three)))[1:]
    assert added == 1 + 2
    assert again == 0


def test_results_agree_over_threads(modules):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, MAX_LENGTH, 50)
    ids = rng.integers(0, VOCAB, lengths.sum())
    results = [load(modules["request"], n).run_packed(ids, lengths) for n in (1, 2, 3, 1)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_many_threads_share_a_session(modules):
    session = load(modules["request"], threads=1)
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, VOCAB, (1, n)) for n in rng.integers(1, MAX_LENGTH, 16)]
    expected = [session.run(ids) for ids in inputs]
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, len(inputs), 200):
            if not np.array_equal(session.run(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sessions_of_one_file_share_its_code(modules, tmp_path):
    first, second = load(modules["token"], threads=1), load(modules["token"], threads=2)
    assert first._library is second._library
    copy = tmp_path / "copy.so"
    copy.write_bytes(modules["token"].read_bytes())
    assert load(copy)._library is first._library


@pytest.mark.parametrize("module", ["token", "request", "padded"])
def test_sessions_of_one_file_run_at_the_same_time(modules, module):
    """Each on its own threads, from threads of their own."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, VOCAB, (1, n)) for n in rng.integers(1, MAX_LENGTH, 16)]
    expected = [load(modules[module], threads=1).run(ids) for ids in inputs]
    sessions = [load(modules[module], threads) for threads in (1, 2, 3, 1)]
    together = threading.Barrier(len(sessions))

    def work(session):
        together.wait()
        return [np.array_equal(session.run(inputs[i % 16]), expected[i % 16]) for i in range(100)]

    with ThreadPoolExecutor(len(sessions)) as pool:
        assert all(all(right) for right in pool.map(work, sessions))


def test_a_call_lets_other_threads_run(modules):
    """Compiled code runs without Python's global lock."""
    assert load(modules["token"])._main.release_gil


def test_results_outlive_the_session(modules):
    session = load(modules["token"], threads=1)
    out = session.run([[1, 2, 3]])
    expected = out.copy()
    del session
    gc.collect()
    for _ in range(5):
        load(modules["token"], threads=1).run([[4, 5, 6, 7]])
    np.testing.assert_array_equal(out, expected)


def test_a_replaced_file_is_seen(tmp_path):
    path = tiny_module.write(tmp_path / "m.so")
    first = load(path, threads=1)
    for channels in (3, 4):
        tiny_module.write(path, channels=channels)
        assert load(path, threads=1).run([[1, 2]]).shape == (1, 2, channels)
    assert first.run([[1, 2]]).shape == (1, 2, CHANNELS)


def test_a_file_reached_through_a_link(modules, tmp_path):
    link = tmp_path / "link.so"
    link.symlink_to(modules["token"])
    assert load(link, threads=1).run([[1, 2]]).shape == (1, 2, CHANNELS)


def test_repr_says_what_it_is(token):
    assert repr(token) == "<Session tiny: hidden_states, fp32 for avx2, 1 threads>"
