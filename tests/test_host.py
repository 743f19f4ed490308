"""The instruction set of this machine."""

import pytest

from whet.host import host_isa
from whet.runtime.cpu import cpu_flags
from whet.schedules.isa import ISAS
from whet.tune import machine


def test_the_host_gets_the_first_whose_flags_it_has():
    found = host_isa()
    assert cpu_flags().issuperset(found.cpu_flags)
    better = list(ISAS.values())[: list(ISAS).index(found.name)]
    assert not any(cpu_flags().issuperset(other.cpu_flags) for other in better if not other.has_amx)


@pytest.mark.parametrize(("refusal", "name"), [("", "amx_int8"), ("the kernel refuses", "avx512_vnni")])
def test_amx_counts_only_if_the_kernel_grants_it(monkeypatch, refusal, name):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(ISAS["amx_int8"].cpu_flags))
    monkeypatch.setattr(machine, "request_amx", lambda: refusal)
    assert host_isa().name == name


def test_a_machine_without_any_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(["sse2"]))
    with pytest.raises(ValueError, match=r"can run none of amx_int8, .*: it lacks abm, avx, "):
        host_isa()
