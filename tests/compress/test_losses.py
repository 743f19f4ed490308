import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from whet.compress import losses  # noqa: E402

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def states(seed, count=2):
    torch.manual_seed(seed)
    return [torch.randn(2, 4, 8) for _ in range(count)]


def test_a_student_like_its_teacher_has_no_loss():
    logits, vectors = torch.randn(2, 5), torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    own = states(0, 3)
    assert losses.states_loss(own, own, MASK) == 0
    assert float(losses.relations_loss(own, own, MASK, 2)) == pytest.approx(0, abs=1e-6)
    assert float(losses.logits_loss(logits, logits, MASK, "sequence_classification", 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(losses.embedding_loss(vectors, vectors)) == pytest.approx(0, abs=1e-5)


def test_padding_does_not_count():
    own, other = states(0, 3), states(1, 3)
    changed = [x.clone() for x in own]
    for x in changed:
        x[0, 3] = 100.0
    assert losses.states_loss(own, other, MASK) == losses.states_loss(changed, other, MASK)
    relations = [losses.relations_loss(x, other, MASK, 2) for x in (own, changed)]
    torch.testing.assert_close(*relations)
    ends = torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    moved = ends[0].clone()
    moved[0, 3] = 9.0
    both = [losses.logits_loss(x, ends[1], MASK, "question_answering", 1.0) for x in (ends[0], moved)]
    torch.testing.assert_close(*both)


def test_states_are_measured_in_variances():
    own, other = states(0), states(1)
    loss = losses.states_loss(own, other, MASK)
    scaled = losses.states_loss([10 * x for x in own], [10 * x for x in other], MASK)
    torch.testing.assert_close(loss, scaled)


def test_relations_follow_their_definition():
    (x,), (y,) = states(2, 1), states(3, 1)
    first, second = ((v[1, :, :4] @ v[1, :, :4].T / 2).log_softmax(-1) for v in (x, y))
    expected = (second.exp() * (second - first)).sum(-1).mean()
    only = torch.tensor([[False] * 4, [True] * 4])
    full = losses.relations_loss([x[..., :4]], [y[..., :4]], only, 1)
    torch.testing.assert_close(full, expected)


def test_targets_that_are_ignored_have_no_loss():
    output = torch.randn(2, 4, 3)
    target = torch.tensor([[0, -100, 2, -100], [1, -100, -100, -100]])
    loss = losses.label_loss(output, {"target": target}, "token_classification")
    rows = torch.stack([output[0, 0], output[0, 2], output[1, 0]])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(rows, torch.tensor([0, 2, 1])))


def test_labels_weigh_as_much_as_the_share_of_requests_that_have_any():
    output, target = torch.randn(4, 3), torch.tensor([2, -100, 0, -100])
    loss = losses.label_loss(output, {"target": target}, "sequence_classification")
    known = torch.nn.functional.cross_entropy(output[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(loss, known / 2)
    output.requires_grad_()
    none = losses.label_loss(output, {"target": torch.full((4,), -100)}, "sequence_classification")
    none.backward()
    assert none == 0 and not output.grad.any()


def test_answers_are_two_choices_among_the_tokens():
    output = torch.randn(2, 4, 2)
    batch = {"target": torch.tensor([[1, 2], [0, 3]]), "attention_mask": MASK.long()}
    loss = losses.label_loss(output, batch, "question_answering")
    starts, ends = output[..., 0].masked_fill(~MASK, -1e4), output[..., 1].masked_fill(~MASK, -1e4)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(starts, torch.tensor([1, 0])) + entropy(ends, torch.tensor([2, 3]))) / 2
    torch.testing.assert_close(loss, expected)
