from dataclasses import asdict

import pytest

from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.schedules.isa import ISAS
from whet.tune.instance import Instance, generate
from whet.tune.space import space

SPECS = [
    DenseSpec(384, 384, "i8"),
    DenseSpec(50, 68, "i8"),
    DenseSpec(64, 64, "i8_sparse", block_rows=8),
    DenseSpec(64, 64, "i8_sparse", block_rows=1),
    DenseSpec(64, 64, "i8_sparse", block_rows=2),
    DenseSpec(64, 64, "i8_sparse", block_columns=1),
    DenseSpec(3, 40, "f32"),
    AttentionSpec(2, 32, "i8", 64),
    AttentionSpec(2, 32, "f32", 64),
]


def test_expanded_weights_are_blocked_for_tile_registers():
    instance = Instance.of(DenseSpec(64, 64, "i8_expanded"), ISAS["amx_int8"], 0.2)
    settings = list(space(instance))
    assert len(settings) > 2 and all(v["rows"] % 16 == 0 and v["chains"] == 1 for v in settings)
    for values in settings:
        generate(instance, instance.knobs(values))


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_space_holds_the_default_and_more(spec, isa):
    instance = Instance.of(spec, isa, 0.2)
    settings = list(space(instance))
    assert asdict(instance.default_knobs()) in settings
    assert 2 < len(settings) == len({tuple(s.values()) for s in settings})


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_the_space_accepts_can_be_generated(spec):
    for isa in (ISAS["amx_int8"], ISAS["avx2"]):
        instance = Instance.of(spec, isa, 0.2)
        settings = list(space(instance))
        for values in settings[:: max(1, len(settings) // 4)]:
            generate(instance, instance.knobs(values))


def test_accumulators_fit_the_registers():
    for values in space(Instance.of(DenseSpec(384, 384, "i8"), ISAS["avx2"])):
        assert values["rows"] * values["tiles"] * 2 < 16


def test_a_layer_remains_divisible_among_threads():
    for values in space(Instance.of(DenseSpec(384, 384, "i8"), ISAS["avx512_vnni"])):
        assert values["chunk"] <= 96
