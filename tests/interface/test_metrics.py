import numpy as np
import pytest

from whet.metrics import class_of, exact_match, f1_score, normalise_answer, pearson, ranks, spans, spearman


def test_ranks_of_ties_are_their_mean():
    np.testing.assert_array_equal(ranks(np.array([10, 20, 10, 30, 10])), [2, 4, 2, 5, 2])


@pytest.mark.parametrize("seed", range(3))
def test_correlations_agree_with_scipy(seed):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: nothing to compare with")
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, 200).astype(np.float32)
    y = (x + rng.normal(0, 2, 200)).round(seed).astype(np.float32)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x.astype(float), y.astype(float)).statistic, abs=1e-9)


def test_correlation_of_a_constant_is_refused():
    for values in (np.ones(3), np.ones(1)):
        with pytest.raises(ValueError, match="at least 2 rows that differ"):
            spearman(values, np.arange(len(values)))


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Norman, dynasty!", "norman dynasty"), ("An apple a day", "apple day"), ("atheist", "atheist"), ("a", "")],
)
def test_answers_are_normalised_as_squad_does(text, normal):
    assert normalise_answer(text) == normal


def test_exact_match_and_f1():
    assert exact_match("the Normans.", "Normans")
    assert not exact_match("Norman", "Normans")
    assert f1_score("10th and 11th centuries", "in the 10th and 11th centuries") == pytest.approx(2 * 4 / 9)
    assert f1_score("yes yes", "yes") == pytest.approx(2 / 3)
    assert f1_score("no", "yes") == 0
    assert f1_score("", "yes") == 0


def test_classes_by_name_or_number():
    assert class_of("POSITIVE", ("NEGATIVE", "POSITIVE"), 2) == 1
    assert class_of("positive", ("NEGATIVE", "POSITIVE"), 2) == 1
    assert class_of("1", ("NEGATIVE", "POSITIVE"), 2) == 1
    assert class_of("1", ("1", "2"), 2) == 0, "a name comes before a number"
    for label in ("neutral", "2", "-1"):
        with pytest.raises(ValueError, match=f"label '{label}'"):
            class_of(label, ("NEGATIVE", "POSITIVE"), 2)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-a I-a O", {("a", 1, 2)}),
        ("B-a B-a I-a I-b", {("a", 0, 0), ("a", 1, 2), ("b", 3, 3)}),
        ("I-a I-a O I-b-c", {("a", 0, 1), ("b-c", 3, 3)}),  # IOB1, and what follows no B
        ("B-a E-a S-a B-b I-b E-b I-b", {("a", 0, 1), ("a", 2, 2), ("b", 3, 5), ("b", 6, 6)}),  # BIOES
        ("U-a L-a", {("a", 0, 0), ("a", 1, 1)}),
        ("NOUN VERB O", set()),
        ("", set()),
    ],
)
def test_stretches_of_tags_are_those_of_conlleval(tags, found):
    assert spans(tags.split()) == found
