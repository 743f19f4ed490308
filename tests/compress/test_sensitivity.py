import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from tiny_encoders import load, make_sentence_encoder, sentences  # noqa: E402

from whet.compress.blocks import Block  # noqa: E402
from whet.compress.features import in_order, make_features  # noqa: E402
from whet.compress.sensitivity import allocate, measure_sensitivity  # noqa: E402

GRID = (0.0, 0.25, 0.5, 0.75)


def test_curves_rise_and_the_model_is_left_as_it_was(tmp_path):
    encoder = load(make_sentence_encoder(tmp_path / "m"))
    before = {name: p.clone() for name, p in encoder.model.named_parameters()}
    texts = [text for text, _ in sentences(200)]
    batches = [batch for _, batch in in_order(make_features(encoder, texts, 64), 50, encoder)]
    told = []
    curves = measure_sensitivity(encoder, batches, Block(4), GRID, 0.5, 0.01, told.append)
    assert list(curves) == list(encoder.dense) and told[-1] == 12
    for curve in curves.values():
        losses = [curve[s] for s in GRID]
        assert losses[0] == 0 and losses == sorted(losses) and losses[-1] > losses[1] > 0
    assert all(torch.equal(p, before[name]) for name, p in encoder.model.named_parameters())
    with pytest.raises(ValueError, match="more calibration texts than one batch"):
        measure_sensitivity(encoder, batches[:1], Block(4), GRID, 0.5, 0.01)


def test_time_is_spent_where_it_saves_most():
    flat, steep = {0.0: 0.0, 0.5: 0.01, 0.9: 0.02}, {0.0: 0.0, 0.5: 1.0, 0.9: 3.0}
    time = {name: {s: 10 * (1 - s) for s in flat} for name in ("flat", "steep")}
    chosen = allocate({"flat": flat, "steep": steep}, time, 11.0)
    assert chosen == {"flat": 0.9, "steep": 0.0}


@pytest.mark.parametrize("limit", [2.5, 6.0, 11.0, 17.0, 40.0])
def test_the_limit_is_kept_and_nothing_uniform_is_better(limit):
    torch.manual_seed(0)
    loss, time = {}, {}
    for name in "abcd":
        scale, width = torch.rand(2).tolist()
        loss[name] = {s: scale * s**3 for s in GRID}
        time[name] = {s: (1 + 9 * width) * (1 - s) for s in GRID}
    if limit < sum(t[0.75] for t in time.values()):
        with pytest.raises(ValueError, match="even the fastest layers take"):
            allocate(loss, time, limit)
        return
    chosen = allocate(loss, time, limit)

    def total(of, at):
        return sum(of[name][s] for name, s in at.items())

    assert total(time, chosen) <= limit
    for s in GRID:
        uniform = dict.fromkeys("abcd", s)
        if total(time, uniform) <= total(time, chosen):
            assert total(loss, chosen) <= total(loss, uniform) + 1e-12
