"""The instruction set of this machine."""

import pytest

from whet import host
from whet.host import host_isa
from whet.runtime.cpu import cpu_flags
from whet.schedules.isa import ISAS


def test_the_host_gets_the_first_whose_flags_it_has():
    found = host_isa()
    assert cpu_flags().issuperset(found.cpu_flags)
    better = list(ISAS.values())[: list(ISAS).index(found.name)]
    assert not any(cpu_flags().issuperset(other.cpu_flags) for other in better if not other.has_amx)


@pytest.mark.parametrize(("refusal", "name"), [("", "amx_int8"), ("the kernel refuses", "avx512_vnni")])
def test_amx_counts_only_if_the_kernel_grants_it(monkeypatch, refusal, name):
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset(ISAS["amx_int8"].cpu_flags))
    monkeypatch.setattr(host, "request_amx", lambda: refusal)
    assert host_isa().name == name


@pytest.mark.parametrize(
    ("flags", "message"), [((), "no line of flags"), (("sse2",), "this CPU lacks avx, .*none of amx_int8, ")]
)
def test_a_machine_without_any_is_told_what_it_lacks(monkeypatch, flags, message):
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset(flags))
    with pytest.raises(ValueError, match=message):
        host_isa()
