import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from whet.compress.blocks import Block  # noqa: E402
from whet.compress.masks import keep_best  # noqa: E402
from whet.compress.reconstruct import Moments, reconstruct  # noqa: E402

N, K, TOKENS = 16, 24, 600
TINY = 1e-7
"""Damping that hardly moves a solution."""


def layer(seed=0):
    """A weight, correlated inputs with a mean, wanted outputs, their moments."""
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, K) @ torch.randn(K, K) + torch.randn(K)
    weight = torch.randn(N, K)
    wanted = x @ weight.T + torch.randn(N)
    moments = Moments(K, N, x.device)
    moments.add(x[:250], wanted[:250])
    moments.add(x[250:], wanted[250:])
    return weight, x, wanted, moments


def loss(x, wanted, weight, bias):
    return float((wanted - x @ weight.T - bias).double().square().mean(0).sum())


def least_squares(x, wanted, mask):
    """The best weights of every row with its mask, and the bias."""
    weight, bias = torch.zeros(mask.shape), torch.zeros(len(mask))
    ones = torch.ones(len(x), 1)
    for row, kept in enumerate(mask):
        solution = torch.linalg.lstsq(torch.cat([x[:, kept], ones], 1).double(), wanted[:, row, None].double()).solution
        weight[row, kept], bias[row] = solution[:-1, 0].float(), solution[-1, 0].float()
    return weight, bias


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_kept_weights_are_the_least_squares_solution(rows):
    weight, x, wanted, moments = layer()
    made = reconstruct(weight, moments, Block(rows), 0.5, TINY)
    mask = Block(rows).expand(made.keep)
    assert not made.weight[~mask].any()
    expected, bias = least_squares(x, wanted, mask)
    torch.testing.assert_close(made.weight, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(made.bias, bias, rtol=2e-2, atol=2e-2)
    variance = float((wanted - wanted.mean(0)).square().mean(0).sum())
    assert made.error == pytest.approx(loss(x, wanted, made.weight, made.bias) / variance, rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_the_share_of_blocks_that_was_asked_for_goes(sparsity):
    weight, _, _, moments = layer()
    keep = reconstruct(weight, moments, Block(4), sparsity, 0.01).keep
    assert int((~keep).sum()) == round(sparsity * keep.numel())


def test_the_first_block_to_go_is_the_one_whose_loss_is_least():
    weight, x, wanted, moments = layer(1)
    made = reconstruct(weight, moments, Block(16), 1 / 6, TINY)
    losses = []
    for block in range(6):
        keep = torch.ones(1, 6, dtype=torch.bool)
        keep[0, block] = False
        losses.append(loss(x, wanted, *least_squares(x, wanted, Block(16).expand(keep))))
    assert (~made.keep).flatten().nonzero().item() == losses.index(min(losses))


def test_it_beats_magnitude_by_far():
    weight, x, wanted, moments = layer(2)
    made = reconstruct(weight, moments, Block(4), 0.5, 0.01)
    keep = keep_best({"": Block(4).pool(weight.abs(), "mean")}, 0.5)[""]
    cut = weight * Block(4).expand(keep)
    bias = (wanted - x @ cut.T).mean(0)
    assert loss(x, wanted, made.weight, made.bias) < 0.5 * loss(x, wanted, cut, bias)


def test_zero_blocks_stay_zero():
    weight, _, _, moments = layer(3)
    weight[:4, :12] = 0
    keep = reconstruct(weight, moments, Block(4), 0.3, 0.01).keep
    assert not keep[0, :3].any()
    assert int((~keep).sum()) == round(0.3 * keep.numel())
    assert torch.equal(reconstruct(weight, moments, Block(4), 0.0, 0.01).keep, Block(4).held(weight))


def test_damping_keeps_weights_where_texts_show_nothing():
    """Inputs that never vary determine nothing: without damping the system has no solution."""
    torch.manual_seed(0)
    x = torch.randn(100, K)
    x[:, 4:8] = 1.0
    weight = torch.randn(N, K)
    moments = Moments(K, N, x.device)
    moments.add(x, x @ weight.T)
    made = reconstruct(weight, moments, Block(4), 0.0, 0.01)
    torch.testing.assert_close(made.weight, weight, rtol=1e-3, atol=1e-3)


def test_wanted_outputs_are_followed_when_inputs_changed():
    """The targets are the dense model's, the inputs the pruned one's: the layer takes back what was lost before it."""
    weight, x, wanted, _ = layer(4)
    changed = 0.7 * x
    moments = Moments(K, N, x.device)
    moments.add(changed, wanted)
    made = reconstruct(weight, moments, Block(4), 0.0, TINY)
    torch.testing.assert_close(made.weight, weight / 0.7, rtol=1e-3, atol=1e-3)
