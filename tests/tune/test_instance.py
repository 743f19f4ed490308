import pytest

from whet.schedules.attention import AttentionKnobs, AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.schedules.gemm import Blocking
from whet.schedules.isa import ISAS
from whet.tune.instance import Instance, generate, key

AVX2, AMX = ISAS["avx2"], ISAS["amx_int8"]
SPARSE = DenseSpec(64, 32, "i8_sparse", block_rows=8, activation="gelu", per_token=True, output="quads")
ATTENTION = AttentionSpec(4, 16, "i8", 128)


@pytest.mark.parametrize("spec", [SPARSE, DenseSpec(8, 5, "f32"), ATTENTION], ids=str)
def test_json_round_trip(spec):
    instance = Instance.of(spec, AVX2, 0.3)
    again = Instance.from_json(instance.to_json())
    assert again == instance and key(again) == key(instance)
    assert isinstance(again.default_knobs(), AttentionKnobs if spec is ATTENTION else Blocking)


def test_densities_that_hardly_differ_are_one_task():
    assert Instance.of(SPARSE, AVX2, 0.19) == Instance.of(SPARSE, AVX2, 0.21)
    assert Instance.of(SPARSE, AVX2, 0.19) != Instance.of(SPARSE, AVX2, 0.3)
    assert Instance.of(SPARSE, AVX2, 0.0).density > 0


def test_density_means_nothing_to_other_kernels():
    assert Instance.of(ATTENTION, AVX2, 0.2) == Instance.of(ATTENTION, AVX2)
    assert Instance.of(DenseSpec(8, 8, "i8"), AVX2, 0.2).density == 1


def test_attention_is_timed_with_requests_that_it_takes():
    assert Instance.of(ATTENTION, AVX2).tokens == (16, 32, 128)
    assert Instance.of(AttentionSpec(4, 16, "i8", 8), AVX2).tokens == (16,)
    assert Instance.of(SPARSE, AVX2).tokens == (16, 32, 128, 384)


@pytest.mark.parametrize("isa", ISAS.values(), ids=str)
@pytest.mark.parametrize("spec", [SPARSE, DenseSpec(64, 64, "i8"), ATTENTION], ids=str)
def test_default_knobs_are_those_of_an_untuned_kernel(spec, isa):
    generate(Instance.of(spec, isa), Instance.of(spec, isa).default_knobs())


def test_names_tell_instances_apart():
    assert str(Instance.of(SPARSE, AVX2, 0.2)) == "dense 64 × 32 i8 8x4 20% gelu per token → quads"


def test_unknown_op_is_refused():
    with pytest.raises(KeyError):
        Instance.from_json({**Instance.of(ATTENTION, AVX2).to_json(), "op": "pool"})
