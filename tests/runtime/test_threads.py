"""How many CPUs a process may use."""

import os

import pytest

from whet.runtime.threads import available_cpus

CPUS = len(os.sched_getaffinity(0))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", CPUS), ("100000 100000", 1), ("50000 100000", 1), ("110000 100000", min(2, CPUS)), ("", CPUS)],
)
def test_version_2(tmp_path, quota, expected):
    write(tmp_path / "cpu.max", quota)
    assert available_cpus(tmp_path, tmp_path / "none") == expected


def test_version_2_nested(tmp_path):
    """Outside a container the limit is on the group of the process, or on one above it."""
    write(tmp_path / "process", "0::/system.slice/app.service/inner\n")
    write(tmp_path / "system.slice/app.service/cpu.max", "20000 100000\n")
    write(tmp_path / "system.slice/app.service/inner/cpu.max", "max 100000\n")
    assert available_cpus(tmp_path, tmp_path / "process") == 1


@pytest.mark.parametrize(("quota", "expected"), [("-1", CPUS), ("60000", 1), ("0", CPUS)])
def test_version_1(tmp_path, quota, expected):
    write(tmp_path / "process", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n")
    write(tmp_path / "cpu/docker/x/cpu.cfs_quota_us", quota)
    write(tmp_path / "cpu/docker/x/cpu.cfs_period_us", "100000")
    assert available_cpus(tmp_path, tmp_path / "process") == expected


def test_affinity(tmp_path):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus(tmp_path, tmp_path / "none") == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_here():
    assert 1 <= available_cpus() <= CPUS
