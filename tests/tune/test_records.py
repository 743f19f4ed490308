import json
import threading

import pytest

from whet.schedules.dense import DenseSpec
from whet.schedules.gemm import Blocking
from whet.schedules.isa import ISAS
from whet.tune import records as module
from whet.tune.instance import Instance
from whet.tune.machine import cpu_type
from whet.tune.records import Record, Records, TunedKnobs, all_records, file_name, merge
from whet.tune.report import report

AVX2 = ISAS["avx2"]
LAYER = DenseSpec(64, 32, "i8")
INSTANCE = Instance.of(LAYER, AVX2)
KNOBS = Blocking(4, 2, 8, 32)
RATIOS = (0.9, 0.8, 0.85, 0.95)
SECONDS = (1e-6, 2e-6, 3e-6, 4e-6)
TRIAL = Record(INSTANCE, KNOBS, RATIOS, SECONDS)
VERDICT = Record(INSTANCE, KNOBS, RATIOS, SECONDS, settled=True)


def test_what_is_added_is_read_again(tmp_path):
    records = Records.open(tmp_path, AVX2)
    failure = Record(INSTANCE, Blocking(8, 1, 8, 32), (), error="out of registers")
    for record in (TRIAL, failure, VERDICT):
        records.add(record)
    again = Records.open(tmp_path, AVX2)
    assert again.records == [TRIAL, failure, VERDICT] == records.records
    assert again.measured(INSTANCE) == {KNOBS: TRIAL, failure.knobs: failure}
    assert again.settled(INSTANCE) == VERDICT
    assert not again.skipped and not again.notes()
    assert failure.ratio == float("inf") and TRIAL.ratio == pytest.approx(0.875)


def test_each_instruction_set_and_cpu_has_its_file(tmp_path):
    Records.open(tmp_path, AVX2).add(TRIAL)
    assert [p.name for p in tmp_path.iterdir()] == [file_name("avx2", cpu_type())]
    assert not Records.open(tmp_path, ISAS["avx_vnni"]).records
    assert not Records.open(tmp_path, AVX2, "Another CPU @ 2 GHz").records
    assert file_name("avx2", "AMD EPYC(TM) 9K @ 2.0GHz ") == "avx2--AMD-EPYC-TM-9K-2-0GHz.jsonl"


def damaged(change):
    """A line of a verdict with its JSON object changed."""
    value = json.loads(module.format_record(VERDICT, cpu_type()))
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (damaged(lambda v: v.update(version="0123456789abcdef")), "other kernel generators"),
        (damaged(lambda v: v.update(cpu="Another")), "made on Another for avx2"),
        (damaged(lambda v: v["kernel"].update(isa="avx_vnni")), "for avx_vnni"),
        (damaged(lambda v: v.update(format=2)), "format 2"),
        (damaged(lambda v: v.pop("ratios")), "corrupt"),
        (damaged(lambda v: v.update(ratios=[0.5])), "corrupt"),
        (damaged(lambda v: v.update(ratios=[-1, 1, 1, 1])), "corrupt"),
        (damaged(lambda v: v["knobs"].update(rows=0)), "corrupt"),
        (damaged(lambda v: v["knobs"].update(width=3)), "corrupt"),
        (damaged(lambda v: v["kernel"]["spec"].update(in_features=-4)), "corrupt"),
        (damaged(lambda v: None)[:-40], "corrupt"),
        ("[]", "corrupt"),
        ("\x00\xff", "corrupt"),
    ],
)
def test_lines_that_do_not_hold_here_are_never_applied(tmp_path, line, reason):
    path = tmp_path / file_name("avx2", cpu_type())
    path.write_text(line + "\n")
    tuned = TunedKnobs(tmp_path, [AVX2])
    assert tuned(LAYER, AVX2, 1.0) is None
    assert reason in tuned.notes()[1]


def test_a_half_line_does_not_spoil_the_next(tmp_path):
    records = Records.open(tmp_path, AVX2)
    records.add(TRIAL)
    with records.path.open("a") as file:
        file.write('{"format": 1, "vers')
    records.add(VERDICT)
    again = Records.open(tmp_path, AVX2)
    assert again.records == [TRIAL, VERDICT] and again.skipped["corrupt"] == 1


def test_two_writers(tmp_path):
    def write():
        mine = Records.open(tmp_path, AVX2)
        for _ in range(100):
            mine.add(TRIAL)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Records.open(tmp_path, AVX2)
    assert len(again.records) == 300 and not again.skipped


def test_merge(tmp_path):
    first, second, into = (tmp_path / name for name in ("a", "b", "into"))
    for folder, record in ((first, TRIAL), (second, VERDICT)):
        folder.mkdir()
        Records.open(folder, AVX2).add(record)
    with next(second.iterdir()).open("a") as file:
        file.write("no record\n" + damaged(lambda v: v.update(version="old")) + "\n")
    name = file_name("avx2", cpu_type())
    assert merge(into, [first, second]) == {name: 3}
    assert merge(into, [first, second]) == {name: 0}
    merged = Records.open(into, AVX2)
    assert merged.records == [TRIAL, VERDICT]
    assert "other kernel generators" in merged.notes()[0]


def test_merging_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records"):
        merge(tmp_path / "into", [tmp_path])
    with pytest.raises(FileNotFoundError, match="no folder"):
        Records.open(tmp_path / "none", AVX2)


def test_the_passes_get_the_verdict_only(tmp_path):
    records = Records.open(tmp_path, AVX2)
    records.add(TRIAL)
    assert TunedKnobs(tmp_path, [AVX2])(LAYER, AVX2, 1.0) is None
    records.add(VERDICT)
    tuned = TunedKnobs(tmp_path, [AVX2])
    assert tuned(LAYER, AVX2, 1.0) == KNOBS
    assert tuned(DenseSpec(64, 36, "i8"), AVX2, 1.0) is None
    assert tuned.notes() == (f"Knobs of 1 of 2 kernels come from records of {cpu_type()}.",)


def test_report(tmp_path):
    Records.open(tmp_path, AVX2).add(TRIAL)
    Records.open(tmp_path, AVX2).add(VERDICT)
    found = report(tmp_path)
    assert [g.trials for g in found.gains] == [1]
    assert found.speedup == pytest.approx(1 / (0.9 * 0.8 * 0.85 * 0.95) ** 0.25)
    assert "+14.5%" in str(found) and "16: 0.90" in str(found)
    assert json.loads(found.to_json())["gains"][0]["knobs"]["rows"] == 4
    assert [r.cpu for r in all_records(tmp_path)] == [cpu_type()]
    with pytest.raises(FileNotFoundError, match="no records"):
        report(tmp_path / "none")
