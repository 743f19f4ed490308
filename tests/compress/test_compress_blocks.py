import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from whet.compress.blocks import ROWS, Block  # noqa: E402
from whet.compress.masks import cubic, keep_best  # noqa: E402


@pytest.mark.parametrize("rows", ROWS)
def test_shapes_are_read_and_printed(rows):
    assert str(Block.parse(f"{rows}x4")) == f"{rows}x4"
    assert Block.parse(f" {rows} × 4 ") == Block(rows)


@pytest.mark.parametrize("text", ["4", "4x1", "3x4", "x4", "4x4x4", ""])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match=r"expected one of 1x4, 2x4, 4x4, 8x4, 16x4"):
        Block.parse(text)


def test_a_block_is_rows_by_four_channels():
    weight = torch.arange(8 * 12, dtype=torch.float32).view(8, 12)
    assert torch.equal(Block(4).view(weight)[1, :, 2], weight[4:8, 8:12])
    mean, most = (Block(4).pool(weight, pooling) for pooling in ("mean", "max"))
    assert mean.shape == (2, 3)
    assert mean[1, 2] == weight[4:8, 8:12].mean() and most[1, 2] == weight[7, 11]


def test_expanded_masks_hold_whole_blocks():
    keep = torch.tensor([[True, False], [False, True]])
    mask = Block(2).expand(keep)
    assert mask.shape == (4, 8)
    assert mask[:2, :4].all() and not mask[:2, 4:].any() and mask[2:, 4:].all()
    weight = torch.ones(4, 8) * mask
    weight[3, 4:] = 0  # half a block is still a block
    assert torch.equal(Block(2).held(weight), keep)


def test_the_lowest_scores_go():
    scores = {"a": torch.tensor([[1.0, 5.0, 3.0, 7.0]]), "b": torch.tensor([[2.0, 9.0], [8.0, 6.0]])}
    each = keep_best(scores, 0.5)
    assert each["a"].tolist() == [[False, True, False, True]]
    assert each["b"].tolist() == [[False, True], [True, False]]
    both = keep_best(scores, 0.25, everywhere=True)
    assert both["a"].tolist() == [[False, True, True, True]]
    assert both["b"].tolist() == [[False, True], [True, True]]


def test_ties_are_broken_by_position_and_what_is_gone_stays_gone():
    assert keep_best({"": torch.zeros(4)}, 0.5)[""].tolist() == [False, False, True, True]
    assert not keep_best({"": torch.tensor([-torch.inf, 1.0])}, 0.0)[""][0]


def test_sparsity_grows_by_a_cubic():
    assert cubic(0, 0.8) == 0 and cubic(1, 0.8) == pytest.approx(0.8) and cubic(2, 0.8) == pytest.approx(0.8)
    assert cubic(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
