"""The cost model orders kernels as measurements do."""

import pytest

from whet.schedules.cost import estimate_cycles
from whet.schedules.dense import BLOCKS, DenseSpec
from whet.schedules.isa import ISAS

EVERY_ISA = pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)


def cost(isa, weight="i8_sparse", block=(4, 4), density=0.2, tiles=8, n=768, k=768, **more):
    return estimate_cycles(DenseSpec(n, k, weight, *block, **more), tiles, density, isa)


@EVERY_ISA
@pytest.mark.parametrize("tiles", [1, 2, 8, 24])
def test_four_fifths_of_zeros_pay_and_none_do_not(isa, tiles):
    if not (isa.name == "amx_int8" and tiles == 24):  # where they tie
        assert cost(isa, tiles=tiles) < cost(isa, "i8", tiles=tiles)
    assert cost(isa, tiles=tiles, density=1.0) >= cost(isa, "i8", tiles=tiles)


@EVERY_ISA
def test_more_work_costs_more(isa):
    for more in ({"density": 0.3}, {"tiles": 9}, {"n": 1000}, {"k": 1000}, {"activation": "gelu"}):
        assert cost(isa, **more) > cost(isa)


@EVERY_ISA
def test_larger_blocks_of_the_same_density_cost_no_more(isa):
    costs = [cost(isa, block=block) for block in BLOCKS["i8_sparse"] if block[1] == 4]
    assert costs == sorted(costs, reverse=True)


def test_faster_instruction_sets_cost_less():
    costs = [cost(isa, "i8") for isa in ISAS.values()]
    assert costs == sorted(costs)


def test_amx_moves_the_choice_towards_dense():
    """At 128 tokens dense AMX took 87 µs, 4 × 4 blocks 50 µs where 20 % are kept and 95 µs where 40 % are."""
    amx, vnni = ISAS["amx_int8"], ISAS["avx512_vnni"]
    assert cost(amx) < cost(amx, "i8") < cost(amx, density=0.45)
    assert cost(vnni, density=0.45) < cost(vnni, "i8")


@pytest.mark.parametrize("block", BLOCKS["i8_expanded"])
def test_expanded_weights_win_on_few_tokens_and_lose_nothing_but_masks_on_many(block):
    """At 16 tokens dense AMX took 173 µs, expanded 4 × 4 and 1 × 1 blocks 72 and 91 µs where 20 % are kept."""
    amx = ISAS["amx_int8"]
    expanded, dense = (
        [cost(amx, weight, block, tiles=tiles, n=768, k=3072) for tiles in (1, 24)] for weight in ("i8_expanded", "i8")
    )
    assert expanded[0] < 0.6 * dense[0]
    assert expanded[1] < dense[1] < 1.5 * expanded[1]
    assert cost(amx, "i8_expanded", block, density=1.0) > cost(amx, "i8")


@pytest.mark.parametrize(("change", "message"), [({"density": 1.5}, "density is 1.5"), ({"tiles": 0}, "tiles is 0")])
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cost(ISAS["avx2"], **change)
