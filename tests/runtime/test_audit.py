"""Audits: caches that err are trusted less, those that recover are trusted again, and what is kept is checked."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from whet.runtime import audit
from whet.runtime.audit import LEAST, WINDOW, Auditor, audited_requests, expected_loss, tightened
from whet.runtime.metadata import ArtifactError

FITTED = np.array([0.9, 0.8], np.float32)
DIGEST = bytes(range(64))


class Caches:
    """An engine of two caches and two classes: a request's first id says which of them err, its second the trust."""

    def __init__(self, path=Path("m.so")):
        self.path = path
        self.thresholds = FITTED.copy()
        self.metadata = SimpleNamespace(allowed_loss=0.05, budget=0.005, exits=(0, 1, 2), leave=())

    def traced(self, ids, lengths, positions, types):
        wrong, trust = ids[0], ids[1] / 100
        (leaves,) = np.nonzero(trust >= self.thresholds)
        answered = leaves[0] if len(leaves) else 2
        answer = [9.0, 0.0] if answered < 2 and int(wrong) >> int(answered) & 1 else [0.0, 9.0]
        return np.array([[*answer, answered, trust if answered < 2 else 1]], np.float32)


def auditor(tmp_path, digest=DIGEST, share=1.0, leave=()):
    engine = Caches(tmp_path / "m.so")
    engine.metadata.leave = leave
    return engine, Auditor(engine, Caches(tmp_path / "m.so"), share, tmp_path / "m.so.audit", digest)


def serve(engine, watched, wrong, count, least=0):
    """Requests with a trust of ``least`` to 100 hundredths."""
    rng = np.random.default_rng(count)
    for i in range(1, count + 1):
        request = np.array([wrong, rng.integers(least, 101)]), np.array([2]), np.arange(2), None
        watched.offer(*request, engine.traced(*request)[:, -2])
        if i % 100 == 0 or i == count:
            watched.wait()


def test_right_caches_stay_as_they_are(tmp_path):
    engine, watched = auditor(tmp_path)
    serve(engine, watched, 0, LEAST + 10)
    np.testing.assert_array_equal(engine.thresholds, FITTED)
    assert (watched.count, watched.dropped, watched.loss) == (LEAST + 10, 0, 0.0)


def test_wrong_caches_are_tightened_and_trusted_again_when_they_recover(tmp_path):
    engine, watched = auditor(tmp_path)
    serve(engine, watched, 0b11, LEAST - 1)
    np.testing.assert_array_equal(engine.thresholds, FITTED)  # too few to say anything
    serve(engine, watched, 0b11, 20)
    assert (engine.thresholds > FITTED).all()
    assert watched.loss <= 0.005 and watched.alarmed
    serve(engine, watched, 0, WINDOW)
    np.testing.assert_array_equal(engine.thresholds, FITTED)
    assert not watched.alarmed


def test_what_was_seen_survives(tmp_path):
    engine, watched = auditor(tmp_path)
    serve(engine, watched, 0b11, LEAST + 1)
    again, reloaded = auditor(tmp_path)
    np.testing.assert_array_equal(again.thresholds, engine.thresholds)
    assert reloaded.loss == watched.loss
    assert [p.name for p in tmp_path.iterdir()] == ["m.so.audit"]


def test_the_newest_requests_are_kept_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "KEPT", 300)
    _, watched = auditor(tmp_path)
    for i in range(310):
        length = 2 + i % 3
        types = None if i % 2 else np.ones(length, int)
        watched.offer(np.full(length, i), np.array([length]), np.arange(length), types, np.zeros(1))
        if i % 100 == 0:
            watched.wait()
    watched.wait()
    kept = audited_requests(tmp_path / "m.so.audit")
    for i, request in zip(range(10, 310), kept, strict=True):
        np.testing.assert_array_equal(request.ids, [i] * (2 + i % 3))
        np.testing.assert_array_equal(request.positions, np.arange(2 + i % 3))
        np.testing.assert_array_equal(request.types, [1 - i % 2] * (2 + i % 3))
    _, again = auditor(tmp_path)
    again.wait()
    assert [r.ids[0] for r in audited_requests(tmp_path / "m.so.audit")] == [r.ids[0] for r in kept]


def test_a_failure_is_told_and_survived(tmp_path, caplog):
    engine, watched = auditor(tmp_path)
    watched.offer(np.array([0]), np.array([1]), np.arange(1), None, np.zeros(1))  # the caches want a second id
    watched.wait()
    assert f"an audit of {tmp_path / 'm.so'} failed" in caplog.text
    serve(engine, watched, 0, 3)
    assert watched.count == 3


def test_files_of_others_and_damaged_ones_are_refused(tmp_path):
    engine, watched = auditor(tmp_path)
    serve(engine, watched, 0, 3)
    with pytest.raises(ArtifactError, match="keeps audits of another module than"):
        auditor(tmp_path, digest=bytes(64))
    path = tmp_path / "m.so.audit"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged or keeps no audits"):
            auditor(tmp_path)
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(b"{}", np.uint8), trust=np.zeros((1, 2)), loss=np.zeros((1, 2)))
    with pytest.raises(ArtifactError, match="delete it to start anew"):
        auditor(tmp_path)


def test_what_can_not_be_audited(tmp_path):
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"audit is {share}; expected a share"):
            auditor(tmp_path, share=share)
    without = Caches()
    without.thresholds = None
    with pytest.raises(ValueError, match="has no caches to audit"):
        Auditor(without, Caches(), 0.1, tmp_path / "a", DIGEST)


def test_a_share_is_taken(tmp_path):
    _, watched = auditor(tmp_path, share=0.2)
    lengths = np.full(2000, 2)
    watched._run = lambda: None  # nobody takes them from the queue
    many = np.zeros(4000, int), lengths, np.zeros(4000, int), None, np.zeros(2000)
    watched.offer(*many)
    taken = watched._queue.qsize() + watched.dropped
    assert 300 < taken < 500 and watched._queue.qsize() == 256
    watched.alarmed, watched.share = True, 0.02
    watched.offer(*many)
    assert 300 < watched._queue.qsize() + watched.dropped - taken < 500  # 10 times as many


def test_new_errors_count_however_much_went_well_before(tmp_path):
    engine, watched = auditor(tmp_path)
    serve(engine, watched, 0, WINDOW)
    serve(engine, watched, 0b11, 60)
    assert watched.loss < 0.02
    assert (engine.thresholds > FITTED).any()


LIKE, UNLIKE = {"least": 75}, {"least": 0}
LEAVE = (11 / 26, 10 / 26, 5 / 26)
"""Shares of requests of the kind LIKE that leave at each cache, and at the end."""


def test_requests_that_leave_elsewhere_are_trusted_once_they_were_audited(tmp_path):
    engine, watched = auditor(tmp_path, share=0.02, leave=LEAVE)
    serve(engine, watched, 0, 1000, **LIKE)
    np.testing.assert_array_equal(engine.thresholds, FITTED)
    serve(engine, watched, 0, 50, **UNLIKE)
    assert watched.changes == 1 and watched.alarmed
    assert (engine.thresholds > 1).all() and watched.loss == 0
    # Where nothing is lost they are trusted again, and expected from then on.
    watched.share = 1.0
    serve(engine, watched, 0, LEAST, **UNLIKE)
    np.testing.assert_array_equal(engine.thresholds, FITTED)
    watched.share = 0.02
    serve(engine, watched, 0, 1000, **UNLIKE)
    assert watched.changes == 1 and not watched.alarmed


def test_after_a_change_the_audits_of_before_say_nothing_even_after_a_restart(tmp_path):
    engine, watched = auditor(tmp_path, leave=LEAVE)
    serve(engine, watched, 0, WINDOW, **LIKE)
    watched.share = 1e-9
    serve(engine, watched, 0b11, 50, **UNLIKE)
    assert watched.changes == 1
    engine, watched = auditor(tmp_path, leave=LEAVE)
    serve(engine, watched, 0b11, 1)
    assert (engine.thresholds > 1).all()  # nothing is trusted until enough was audited
    serve(engine, watched, 0b11, LEAST)
    assert watched.alarmed and watched.loss <= 0.005


def test_expected_loss():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32)) + 3
    np.testing.assert_allclose(expected_loss(np.array([0, 1, 2]), logits), [0, 0.2, 0.3], atol=1e-6)


def test_tightened_is_the_least_that_suffices():
    rng = np.random.default_rng(0)
    trust = rng.random((500, 2))
    loss = (rng.random((500, 2)) > trust).astype(float)
    losses = []
    for allowed in (1.0, 0.1, 0.03, 0.0):
        thresholds = tightened(np.array([0.5, 0.5], np.float32), trust, loss, allowed)
        first = (trust >= thresholds).argmax(1)
        lost = np.where((trust >= thresholds).any(1), loss[np.arange(500), first], 0).mean()
        assert lost <= allowed
        losses.append(lost)
    assert losses == sorted(losses, reverse=True) and losses[1] > 0.07
