"""From texts to a memo file to requests that use it: the bits of the answers, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from memo_files import look_up_everywhere, make_texts

import whet
from whet import MemoError, cli
from whet.memoizing import build, inspect, measure
from whet.runtime.memo import LEVELS
from whet.runtime.memo_file import KEYS, MemoFile, describe


@pytest.fixture(autouse=True)
def look_for_new_files_at_every_call(monkeypatch):
    monkeypatch.setattr("whet.runtime.memo.LOOK_EVERY", 0)


@pytest.fixture(scope="module")
def texts(references):
    return make_texts(references)


@pytest.fixture(scope="module")
def module(references, tmp_path_factory):
    path = tmp_path_factory.mktemp("memo") / "a.so"
    whet.compile(references / "bert-sequence", path, isa="avx2", memo=True)
    return path


@pytest.fixture(scope="module")
def built(module, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("memo") / "a.memo"
    return path, build(module, path, texts[:180], texts[180:], memory=32 << 20)


@pytest.fixture
def memo(built, tmp_path):
    """A file whose levels look up at all lengths, whatever this machine's times were: strict finds the same only."""
    path = tmp_path / "a.memo"
    path.write_bytes(built[0].read_bytes())
    look_up_everywhere(path)
    return path


def test_report(built, texts):
    path, report = built
    assert inspect(path, verify=True) == report
    assert report.count == len(set(texts[:180]))
    assert report.held_out == 120
    assert list(report.levels) == list(LEVELS)
    assert report.hits["strict"] <= report.hits["default"] <= report.hits["loose"]
    assert report.loss["default"] <= 0.5
    assert report.keys_of["strict"] == "words" and set(report.keys_of.values()) <= set(KEYS)
    assert sum(b.requests for b in report.buckets) <= 120
    assert "records" in str(report)


def test_repeats_keep_the_bits_of_their_answers_alone_and_among_others(module, memo, texts):
    plain, session = whet.load(module, threads=1), whet.load(module, threads=1, memo=memo, memo_level="strict")
    wanted = plain.logits(texts)
    np.testing.assert_array_equal(session.logits(texts), wanted)
    assert session.memo.hits == 180 and session.memo.misses == 120
    for i in (0, 5, 200):
        np.testing.assert_array_equal(session.logits([texts[i]])[0], wanted[i])
    np.testing.assert_array_equal(session.logits(texts[:180]), wanted[:180])
    mixed = [text for pair in zip(texts[:100], texts[180:280], strict=True) for text in pair]
    np.testing.assert_array_equal(session.logits(mixed), plain.logits(mixed))


def test_near_requests_use_others_attention_and_misses_keep_their_bits(module, memo, texts):
    plain, session = whet.load(module, threads=1), whet.load(module, threads=1, memo=memo, memo_level="loose")
    wanted, got = plain.logits(texts), session.logits(texts)
    same = (wanted == got).all(axis=1)
    assert same[:180].all()
    assert 60 < session.memo.hits - 180 < 121
    assert (~same).sum() > 0.7 * (session.memo.hits - 180)
    lengths = {r.shape[1] for r in plain.requests(texts[:180])}
    assert max(lengths) < 60
    longer = " ".join(["a"] * 70)
    np.testing.assert_array_equal(session.logits([longer]), plain.logits([longer]))


def test_token_types_and_positions_are_part_of_a_request(module, memo, texts):
    plain, session = whet.load(module, threads=1), whet.load(module, threads=1, memo=memo, memo_level="loose")
    (tokens,) = plain.requests([texts[0]])
    ids, length = tokens[0], [tokens.shape[1]]
    before = session.memo.hits
    types = np.ones_like(ids)
    moved = np.arange(len(ids)) + 3
    for options in ({"token_types": types}, {"positions": moved}):
        np.testing.assert_array_equal(
            session.run_packed(ids, length, **options), plain.run_packed(ids, length, **options)
        )
    assert session.memo.hits == before


def test_a_file_grows_while_it_serves(module, memo, texts):
    plain = whet.load(module, threads=1)
    session = whet.load(module, threads=1, memo=memo, memo_level="strict", memo_grow=True)
    reader = whet.load(module, threads=1, memo=memo, memo_level="strict")
    wanted = plain.logits(texts)
    count = session.memo.file.count
    np.testing.assert_array_equal(session.logits(texts), wanted)
    assert session.memo.file.count == count + len(set(texts[180:]) - set(texts[:180]))
    session.memo.file.verify()
    for other in (session, reader):
        before = other.memo.misses
        np.testing.assert_array_equal(other.logits(texts), wanted)
        assert other.memo.misses == before


def test_records_have_both_keys_those_that_are_added_while_serving_too(module, memo, texts):
    session = whet.load(module, threads=1, memo=memo, memo_grow=True)
    session.logits(texts)
    file = session.memo.file
    assert file.count > 180 and all(np.abs(vectors).max() > 0 for vectors in file.vectors)
    for i in range(file.count):
        np.testing.assert_array_equal(file.keys[:, i], session.memo.keys_of(file.tokens(i)))


def test_each_level_uses_the_kind_of_key_that_the_file_names(module, memo, texts):
    learned = dict.fromkeys(LEVELS, "learned")
    describe(memo, replace(MemoFile(memo).description, keys_of=learned))
    session = whet.load(module, threads=1, memo=memo, memo_level="loose")
    tokens = session.requests([texts[200]])[0]
    number, distance = session.memo.nearest(tokens)
    file = session.memo.file
    apart = file.vectors[1][tokens[0]] - file.vectors[1][file.tokens(number)[0]]
    assert distance == pytest.approx(np.sqrt(np.square(apart).sum() / tokens.shape[1]), rel=1e-5)


def test_a_batch_finds_what_its_requests_find_alone(module, memo, texts):
    session = whet.load(module, threads=2, memo=memo, memo_level="loose")
    requests = session.requests(texts)
    alone = [session.memo.nearest(tokens)[0] for tokens in requests]
    ids, types = (np.concatenate([tokens[i] for tokens in requests]) for i in (0, 1))
    found = session.memo.find(ids, types, np.array([tokens.shape[1] for tokens in requests]))
    wanted = [0 if number is None else found.file.address(number) for number in alone]
    np.testing.assert_array_equal(found.records[:, 0], wanted)
    assert np.count_nonzero(wanted) >= 180


def test_only_lengths_that_pay_look_up(module, memo, texts):
    describe(memo, replace(MemoFile(memo).description, pays={level: [[1, 8], [12, 12]] for level in LEVELS}))
    session = whet.load(module, threads=1, memo=memo, memo_level="strict")
    wanted = whet.load(module, threads=1).logits(texts)
    np.testing.assert_array_equal(session.logits(texts), wanted)
    pays = [tokens.shape[1] <= 8 or tokens.shape[1] == 12 for tokens in session.requests(texts)]
    assert session.memo.hits == sum(pays[:180]) and session.memo.misses == sum(pays[180:])
    before = session.memo.hits, session.memo.misses
    longer = [text for text, looked in zip(texts, pays, strict=True) if not looked]
    session.logits(longer)
    assert (session.memo.hits, session.memo.misses) == before


def test_a_damaged_record_does_no_harm(module, memo, texts):
    file = MemoFile(memo)
    damaged = bytearray(memo.read_bytes())
    for i in range(file.count):
        start = int(file.entries["offset"][i])
        damaged[start : start + 4] = b"\xff\xff\xff\x7f"  # a word that no vocabulary has
    memo.write_bytes(damaged)
    session = whet.load(module, threads=1, memo=memo, memo_level="strict")
    np.testing.assert_array_equal(session.logits(texts), whet.load(module, threads=1).logits(texts))
    assert session.memo.hits == 0


def test_a_full_file_lets_go_of_what_was_not_used(module, texts, tmp_path):
    path, plain = tmp_path / "small.memo", whet.load(module, threads=1)
    for memory in (1 << 20, 0):
        memory = memory or MemoFile(path).description.first_record + 100_000
        report = build(module, path, texts[:30], texts, memory=memory)
    assert report.count == 30
    look_up_everywhere(path)
    grown = whet.load(module, threads=1, memo=path, memo_level="strict", memo_grow=True)
    reader = whet.load(module, threads=1, memo=path, memo_level="strict")
    popular = texts[:3]
    wanted = dict(zip(texts, plain.logits(texts), strict=True))
    before = grown.memo.file
    for text in texts[30:]:
        for session in (grown, reader):
            found = session.logits([*popular, text])
            np.testing.assert_array_equal(found, [wanted[t] for t in (*popular, text)])
    assert grown.memo.file is not before and reader.memo.file.count == grown.memo.file.count < len(texts)
    grown.memo.file.verify()
    for session in (grown, reader):
        hits = session.memo.hits
        session.logits([*popular, texts[-1]])
        assert session.memo.hits == hits + 4
    assert not grown.memo.file.replaced and not reader.memo.file.replaced


def test_a_file_that_was_built_anew_is_not_taken_for_the_old_one(memo, module, texts):
    session = whet.load(module, threads=1, memo=memo, memo_level="strict")
    anew = memo.with_name("b.memo")
    anew.write_bytes(memo.read_bytes())
    describe(anew, replace(MemoFile(anew).description, levels={"strict": 1e9, "default": 1e9, "loose": 1e9}))
    anew.replace(memo)
    with pytest.warns(UserWarning, match=r"stays in use: .* was built anew; load the module again"):
        session.logits(texts)
    assert session.memo.hits == 180
    session.logits(texts)  # it is said once


def test_a_file_serves_a_build_for_other_instruction_sets(memo, references, texts, tmp_path):
    whet.compile(references / "bert-sequence", tmp_path / "b.so", isa=["avx_vnni", "avx2"], memo=True)
    plain = whet.load(tmp_path / "b.so", threads=1, isa="avx2")
    session = whet.load(tmp_path / "b.so", threads=1, isa="avx2", memo=memo, memo_level="strict")
    np.testing.assert_array_equal(session.logits(texts), plain.logits(texts))
    assert session.memo.hits == 180


def test_another_module_s_file_is_refused(module, memo, references, tmp_path):
    whet.compile(references / "bert-sequence", tmp_path / "plain.so", isa="avx2")
    with pytest.raises(MemoError, match="without the use of records"):
        whet.load(tmp_path / "plain.so", memo=memo)
    other = ["the", "a cat"]
    whet.compile(references / "bert-sequence", tmp_path / "other.so", isa="avx2", memo=True, calibration=other)
    with pytest.raises(MemoError, match="built for another model, or another build"):
        whet.load(tmp_path / "other.so", memo=memo)
    with pytest.raises(ValueError, match="memo_level is 'bold'"):
        whet.load(module, memo=memo, memo_level="bold")


def test_refusals(module, texts, references, tmp_path):
    for options, message in (
        ({"memory": 1000}, "too little for any record"),
        ({"max_loss": -1}, "max_loss is -1"),
        ({"held_out": texts[:9]}, "9 to choose on"),
    ):
        with pytest.raises(ValueError, match=message):
            build(module, tmp_path / "a.memo", texts[:150], **{"held_out": texts[150:], **options})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="for precision 'int8'"):
        whet.compile(references / "bert-sequence", tmp_path / "a.so", "fp32", memo=True)


def test_measure(module, memo, texts):
    found = measure(module, memo, texts[150:190], level="strict")
    assert (found.requests, found.looked_up, found.hits) == (40, 40, 30)
    assert (found.loss, found.same) == (0, 1)
    assert "30 hit (75.0%" in str(found)


def test_command_line(module, texts, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    memo = str(tmp_path / "b.memo")
    build = ["memo", "build", str(module), "--corpus", str(tmp_path / "corpus.txt"), "-o", memo]
    assert cli.main([*build, "--memory", "20MiB", "--max-loss", "50", "--held-out", str(tmp_path / "corpus.txt")]) == 0
    assert "records" in capsys.readouterr().out
    assert cli.main(["memo", "inspect", memo, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["room"] == 20 << 20
    assert cli.main(["run", str(module), texts[0], "--memo", memo, "--memo-level", "strict"]) == 0
    bench = ["bench", str(module), "--memo", memo]
    assert cli.main(bench) == 1
    assert "--texts" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("\n".join(texts[:5]))
    assert cli.main([*bench, "--texts", str(tmp_path / "few.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] == 1
    assert cli.main([*build, "--memory", "much"]) == 2
