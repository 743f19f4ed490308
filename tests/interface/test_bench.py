import json
import math
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from whet import bench as module_under_test
from whet.bench import bench, choose_cpus, interleave
from whet.peers import Missing, Peer
from whet.runtime.artifact import open_artifact


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module_under_test, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(module_under_test, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(module_under_test, "SETTLE_SECONDS", 0.001)


def test_engines_take_turns_and_nobody_is_always_first():
    calls = []

    def step(name):
        calls.append(name)
        time.sleep(0.004)

    times = interleave({"a": lambda: step("a"), "b": lambda: step("b")}, 0.06)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert len(turns) > 6, "blocks, not one after the other"
    for seconds in times.values():
        assert len(seconds) >= 10 and seconds.sum() >= 0.06
        assert np.median(seconds) == pytest.approx(0.004, rel=0.5)


def test_slow_engines_get_their_least_runs():
    times = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 0.001)
    assert len(times["slow"]) == module_under_test.LEAST_RUNS


def test_an_interrupt_ends_the_measurement():
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": lambda: None}, 60, stop)


def test_an_interrupt_reaches_the_pinned_thread():
    seen = []

    def work(stop):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        seen.append(stop.wait(10))

    with pytest.raises(KeyboardInterrupt):
        module_under_test.pinned(1, work)
    assert seen == [True]


def test_errors_reach_the_caller():
    def work(stop):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        module_under_test.pinned(1, work)


def test_every_case_is_timed(tiny_modules):
    report = bench(tiny_modules["embedding"], batches=[1, 3], sequences=[2, 20], min_seconds=0.01)
    cases = [(t.batch, t.sequence, t.threads) for t in report.timings]
    assert cases == [(1, 2, 1), (1, 20, 1), (3, 2, 1), (3, 20, 1)]
    for t in report.timings:
        assert t.engine == "whet fp32" and t.ratio == 1 and t.cosine == pytest.approx(1)
        assert 0 < t.p10_ms <= t.median_ms <= t.p90_ms
    assert json.loads(report.to_json())["timings"][0]["batch"] == 1
    assert "whet fp32" in str(report) and report.cpu in str(report)
    assert "computes something else" not in str(report)


def test_peers_run_on_the_same_cpus_and_are_compared(tiny_modules, monkeypatch):
    seen = []

    def honest(threads):
        def run(inputs):
            seen.append((threads, os.sched_getaffinity(0)))
            time.sleep(0.002)
            return np.ones((*inputs["input_ids"].shape, 5))

        return run

    def failing(threads):
        raise RuntimeError("no such kernel")

    def picky(threads):
        def run(inputs):
            if inputs["input_ids"].shape[1] > 4:
                raise ValueError("too long")
            return np.ones((1, 1))

        return run

    made = [Peer("honest fp32", "1", honest), Peer("failing", "2", failing), Peer("picky", "3", picky)]
    monkeypatch.setattr(module_under_test, "make_peers", lambda *_: [*made, Missing("absent", "not installed")])
    report = bench(tiny_modules["token"], sequences=[4, 8], min_seconds=0.01, against=["honest"], source="m.onnx")
    assert {t for t, _ in seen} == {1} and {len(cpus) for _, cpus in seen} == {1}
    by_engine = {(t.engine, t.sequence): t for t in report.timings}
    assert set(by_engine) == {("whet fp32", 4), ("whet fp32", 8), ("honest fp32", 4), ("honest fp32", 8), ("picky", 4)}
    whet, honest_timing = by_engine["whet fp32", 4], by_engine["honest fp32", 4]
    assert honest_timing.ratio == pytest.approx(honest_timing.median_ms / whet.median_ms)
    assert math.isnan(by_engine["picky", 4].cosine)
    assert not math.isnan(honest_timing.cosine)
    assert json.loads(report.to_json())["timings"][2]["cosine"] is None
    assert "note: a peer computes something else" in str(report)
    assert [m.name for m in report.missing] == ["absent", "failing", "picky"]
    assert "no such kernel" in str(report) and "1 × 8: ValueError: too long" in str(report)


def test_onnxruntime_beside_a_module(tiny_modules, references, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source = references / "bert-hidden-states"
    report = bench(tiny_modules["token"], sequences=[4], min_seconds=0.01, against=["onnxruntime"], source=source)
    assert [t.engine for t in report.timings] == ["whet fp32", "onnxruntime fp32", "onnxruntime int8"]
    assert report.missing == ()
    assert "onnxruntime" in report.versions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": [65]}, "sequence is 65; expected 1 to 64"),
        ({"batches": [0]}, "batch is 0; expected at least 1"),
        ({"threads": [1 << 20]}, "threads is 1048576; expected 1 to"),
        ({"batches": []}, "no batch is given"),
        ({"min_seconds": 0}, "min_seconds is 0"),
        ({"against": ["onnxruntime"]}, "--model"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_modules, arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(tiny_modules["token"], **arguments)


def test_threads_get_a_core_each_before_they_share_one(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, siblings in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert choose_cpus(2, tmp_path) == {0, 2}
    assert choose_cpus(3, tmp_path) == {0, 1, 2}
    assert choose_cpus(2, tmp_path / "none") == {0, 1}


def test_zeros_are_weighed_by_size(tiny_modules):
    metadata = open_artifact(tiny_modules["token"]).metadata
    layers = ({"zeros": 1.0, "out_features": 1, "in_features": 4}, {"zeros": 0.0, "out_features": 3, "in_features": 4})
    assert module_under_test.zeros(replace(metadata, report=layers)) == 0.25
    assert module_under_test.zeros(metadata) == 0
