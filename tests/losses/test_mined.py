import pytest
import torch

from kdbench.losses.divergences import OBJECTIVES, forward_kl
from kdbench.losses.mined import first_of_preimage, first_preimage, largest_of_preimage, one_hot_divergence

STUDENT, TEACHER = 11, 17


def _logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _nearest(seed=1):
    """Tokens 4 and 9 of the student are nearest to none, token 0 to several."""
    nearest = torch.randint(STUDENT, (TEACHER,), generator=torch.Generator().manual_seed(seed))
    nearest[(nearest == 4) | (nearest == 9)] = 0
    return nearest


def _brute_force(logits, nearest, choose):
    rows = []
    for row in logits.tolist():
        preimages = [[row[t] for t, s in enumerate(nearest.tolist()) if s == v] for v in range(STUDENT)]
        rows.append([choose(found) if found else -float("inf") for found in preimages])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_largest_logit_of_a_preimage_and_the_first():
    logits, nearest = _logits(6, TEACHER), _nearest()
    largest = largest_of_preimage(logits, nearest, STUDENT)
    first = first_of_preimage(logits, first_preimage(nearest, STUDENT))
    assert torch.equal(largest, _brute_force(logits, nearest, max))
    assert torch.equal(first, _brute_force(logits, nearest, lambda found: found[0]))
    assert (largest[:, [4, 9]] == -torch.inf).all()
    assert not torch.equal(largest, first)


def test_the_same_vocabulary_keeps_its_logits():
    logits, nearest = _logits(3, TEACHER), torch.arange(TEACHER)
    assert torch.equal(largest_of_preimage(logits, nearest, TEACHER), logits)
    assert torch.equal(first_of_preimage(logits, first_preimage(nearest, TEACHER)), logits)


def test_the_order_of_the_teachers_tokens_does_not_matter():
    logits, nearest = _logits(4, TEACHER), _nearest()
    order = torch.randperm(TEACHER, generator=torch.Generator().manual_seed(2))
    shuffled = largest_of_preimage(logits[:, order], nearest[order], STUDENT)
    assert torch.equal(shuffled, largest_of_preimage(logits, nearest, STUDENT))


def test_nan_and_infinities_stay_where_they_belong():
    logits, nearest = _logits(2, TEACHER), _nearest()
    logits[0, 3], logits[1, 5] = torch.nan, -torch.inf
    for moved in (
        largest_of_preimage(logits, nearest, STUDENT),
        first_of_preimage(logits, torch.full((STUDENT,), 3)),
    ):
        assert moved[0, nearest[3]].isnan()
        assert not moved[1].isnan().any()


def test_the_teacher_gets_no_gradient():
    logits = _logits(2, TEACHER).requires_grad_()
    assert not largest_of_preimage(logits, _nearest(), STUDENT).requires_grad
    assert not first_of_preimage(logits, first_preimage(_nearest(), STUDENT)).requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_finite_where_tokens_have_no_preimage(objective):
    student = _logits(6, STUDENT, seed=3).requires_grad_()
    loss = OBJECTIVES[objective](student, largest_of_preimage(_logits(6, TEACHER), _nearest(), STUDENT), 2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_one_hot_divergence_is_that_from_the_published_one_hot_logits(temperature):
    student, targets = _logits(5, STUDENT).requires_grad_(), torch.tensor([0, 4, 10, 4, 7])
    published = torch.full((5, STUDENT), -100_000.0, dtype=torch.float64)
    published[torch.arange(5), targets] = 100.0
    ours, theirs = one_hot_divergence(student, targets, temperature), forward_kl(student, published, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_gradient_of_the_one_hot_divergence_by_finite_differences():
    student, targets = _logits(3, STUDENT).requires_grad_(), torch.tensor([1, 0, 8])
    assert torch.autograd.gradcheck(lambda z: one_hot_divergence(z, targets, 2.0), student)


def test_no_rows():
    assert largest_of_preimage(torch.zeros(0, TEACHER), _nearest(), STUDENT).shape == (0, STUDENT)
    assert first_of_preimage(torch.zeros(0, TEACHER), first_preimage(_nearest(), STUDENT)).shape == (0, STUDENT)
