"""The costs of mcw_kd: each against its formula cell by cell, its gradient, and what must not change it."""

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses import mcw

COUNTS, TEACHER_COUNTS = torch.tensor([5, 1, 3]), torch.tensor([2, 4, 1])


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _vectors(d=6):
    """Rows (3, 5, d) and columns (3, 4, d) with gradient."""
    return _random(3, 5, d).requires_grad_(), _random(3, 4, d, seed=1).requires_grad_()


def test_l2_costs_are_distances():
    one, other = _vectors()
    expected = torch.stack([torch.stack([(a[:, None] - b).norm(dim=-1) for b in y], 1)[:, :, 0] for a, y in [
        (x, other[i]) for i, x in enumerate(one)
    ]])  # fmt: skip
    torch.testing.assert_close(mcw.l2_costs(one, other), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(mcw.l2_costs, (one, other))


def test_l2_costs_of_near_vectors_keep_their_digits_in_float32():
    """‖x‖² + ‖y‖² - 2 x·y in float32 would be off by more than the distance itself."""
    one = 100 * _random(1, 3, 50, dtype=torch.float32)
    other = one + 1e-3 * _random(1, 3, 50, seed=1, dtype=torch.float32)
    found, exact = mcw.l2_costs(one, other), torch.cdist(one.double(), other.double()).float()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert found.dtype == torch.float32


def test_equal_vectors_have_distance_zero_and_a_finite_gradient():
    one = _random(2, 4, 6).requires_grad_()
    found = mcw.l2_costs(one, one.detach())
    assert (found.diagonal(dim1=1, dim2=2) == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), one, retain_graph=True)
    assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(found.diagonal(dim1=1, dim2=2).sum(), one)
    assert not gradient.any()


@pytest.mark.parametrize("cost", [mcw.l2_costs, mcw.kl_costs, mcw.cosine_costs])
def test_nan_stays_nan(cost):
    one, other = _random(1, 2, 4), _random(1, 3, 4)
    one[0, 1, 2] = torch.nan
    assert cost(one, other).isnan().tolist() == [[[False] * 3, [True] * 3]]


def test_kl_costs_are_divergences_of_student_from_teacher():
    one, other = _vectors()
    q, p = one.log_softmax(-1), other.log_softmax(-1)
    expected = (p.exp()[:, None] * (p[:, None] - q[:, :, None])).sum(-1)
    torch.testing.assert_close(mcw.kl_costs(q, p), expected, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda a, b: mcw.kl_costs(a.log_softmax(-1), b.log_softmax(-1)), (one, other))


def test_kl_costs_of_equal_distributions_are_zero_also_in_float32():
    q = (8 * _random(1, 4, 300, dtype=torch.float32)).log_softmax(-1)
    found = mcw.kl_costs(q, q).diagonal(dim1=1, dim2=2)
    assert found.abs().max() < 1e-7
    extreme = torch.tensor([[[0.0, -200.0, -1e4]]]).log_softmax(-1)
    assert mcw.kl_costs(extreme, extreme.flip(-1)).isfinite().all()


def test_salience_costs():
    one, other = _random(2, 3).requires_grad_(), _random(2, 4, seed=1).requires_grad_()
    expected = [
        [[abs((a.sigmoid() - b.sigmoid()).item()) for b in y] for a in x] for x, y in zip(one, other, strict=True)
    ]
    torch.testing.assert_close(mcw.salience_costs(one, other), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(mcw.salience_costs, (one, other))
    same = mcw.salience_costs(one, one)
    assert torch.autograd.grad(same.diagonal(dim1=1, dim2=2).sum(), one)[0].abs().max() == 0


@pytest.mark.parametrize("reach", [0, 1, 4, 9])
def test_window_means(reach):
    states = _random(3, 5, 2)
    states[torch.arange(5) >= COUNTS[:, None]] = 0.0
    expected = torch.zeros_like(states)
    for b, n in enumerate(COUNTS.tolist()):
        for i in range(n):
            expected[b, i] = states[b, max(i - reach, 0) : min(i + reach + 1, n)].mean(0)
    torch.testing.assert_close(mcw.window_means(states, COUNTS, reach), expected, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: mcw.window_means(x, COUNTS, reach), states.requires_grad_())


def test_cosine_costs():
    one, other = _vectors()
    expected = 1 - F.cosine_similarity(one[:, :, None], other[:, None], dim=-1)
    torch.testing.assert_close(mcw.cosine_costs(one, other), expected, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(mcw.cosine_costs, (one, other))
    zero = torch.zeros(1, 2, 6, dtype=torch.float64, requires_grad=True)
    found = mcw.cosine_costs(zero, other[:1].detach())
    assert (found == 1).all()
    assert torch.autograd.grad(found.sum(), zero)[0].isfinite().all()


def test_the_largest_cost_is_that_of_the_sequence_and_means_leave_padding_out():
    costs = _random(3, 5, 4).abs()
    padded = costs.masked_fill(~mcw.cells(costs, COUNTS, TEACHER_COUNTS), 1e6)
    for b, (n, m) in enumerate(zip(COUNTS, TEACHER_COUNTS, strict=True)):
        assert mcw.largest(padded, COUNTS, TEACHER_COUNTS)[b] == costs[b, :n, :m].max()
        torch.testing.assert_close(mcw.mean_costs(padded, COUNTS, TEACHER_COUNTS)[b], costs[b, :n, :m].mean())


def test_in_units_of_the_largest_a_longer_cost_is_the_same_cost():
    """The published gradient runs through the maximum, so that shrinking all states lowers nothing."""
    costs = _random(3, 5, 4).abs().requires_grad_()
    found = mcw.in_units_of(costs, mcw.largest(costs, COUNTS, TEACHER_COUNTS))
    inside = found[mcw.cells(costs, COUNTS, TEACHER_COUNTS)]
    assert inside.max().item() == pytest.approx(1, abs=1e-6)
    (gradient,) = torch.autograd.grad(inside.sum(), costs)
    assert abs((gradient * costs).sum().item()) < 1e-5
    nothing = torch.zeros(1, 2, 2)
    assert (mcw.in_units_of(nothing, nothing.amax((1, 2))) == 0).all()


def test_share_of_mean_knows_no_unit():
    costs = _random(3, 5, 4).abs()
    cells = mcw.cells(costs, COUNTS, TEACHER_COUNTS)
    plan = _random(3, 5, 4, seed=1).abs() * cells
    plan = plan / plan.sum((1, 2), keepdim=True)
    means = mcw.mean_costs(costs, COUNTS, TEACHER_COUNTS)
    found = mcw.share_of_mean(costs, plan, means)
    torch.testing.assert_close(found, (plan * costs).sum((1, 2)) / means)
    torch.testing.assert_close(mcw.share_of_mean(1e-9 * costs, plan, 1e-9 * means), found)
    at_random = cells / cells.sum((1, 2), keepdim=True)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(mcw.share_of_mean(costs, at_random, means), ones)
    torch.testing.assert_close(mcw.share_of_mean(0 * costs, plan, 0 * means), ones)


def test_interpolation_mixes_partners_and_leaves_the_others():
    student, teacher = _random(5, 3).requires_grad_(), _random(4, 3, seed=1)
    pairs = torch.tensor([[4, 0], [1, 2]])
    found = mcw.interpolate(student, teacher, pairs, 0.25)
    for j, i in {0: 4, 2: 1}.items():
        torch.testing.assert_close(found[j], 0.75 * student[i] + 0.25 * teacher[j])
    assert torch.equal(found[[1, 3]], teacher[[1, 3]])
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient[:, 0].tolist() == [0, 0.75, 0, 0, 0.75]
    assert torch.equal(mcw.interpolate(student, teacher, pairs, 1.0), teacher)
    assert torch.equal(mcw.interpolate(student, teacher, torch.zeros(0, 2, dtype=torch.long), 0.25), teacher)


def test_largest_logits_are_sorted():
    logits = _random(4, 9).requires_grad_()
    found = mcw.largest_logits(logits, 5)
    assert torch.equal(found, logits.sort(-1, descending=True).values[:, :5])
    assert torch.autograd.gradcheck(lambda z: mcw.largest_logits(z, 5), logits)


def _sides():
    one, other = _vectors()
    ids = torch.tensor([[3, 4, 3, 3, 5]] * 3), torch.tensor([[3, 5, 6, 4]] * 3)
    return [
        mcw.Side(states.log_softmax(-1), states[..., 0], states, of)
        for states, of in zip((one, other), ids, strict=True)
    ]


def test_families_of_costs_are_these_costs():
    ours, theirs = _sides()
    counts = COUNTS, TEACHER_COUNTS
    costs, units = mcw.logits_costs(ours, theirs)
    expected = [
        mcw.l2_costs(ours.log_top.exp(), theirs.log_top.exp()),
        mcw.kl_costs(ours.log_top, theirs.log_top),
        mcw.salience_costs(ours.salience, theirs.salience),
    ]
    assert units == []
    assert all(torch.equal(*of) for of in zip(costs, expected, strict=True))
    scaled, units = mcw.logits_costs(ours, theirs, counts)
    for cost, plain, unit in zip(scaled, expected, units, strict=True):
        torch.testing.assert_close(unit, mcw.largest(plain, *counts))
        torch.testing.assert_close(cost, mcw.in_units_of(plain, unit))
    spelling = _random(3, 5, 4).abs().float()
    costs, (unit,) = mcw.hidden_costs(ours, theirs, spelling, counts)
    distance = mcw.l2_costs(ours.context, theirs.context)
    torch.testing.assert_close(unit, mcw.largest(distance, *counts))
    assert torch.equal(costs[0], spelling.double())
    torch.testing.assert_close(costs[1], mcw.in_units_of(distance, unit))
    assert torch.equal(costs[2], mcw.cosine_costs(ours.context, theirs.context))


def test_within_a_vocabulary_other_tokens_cost_1_and_the_unit_may_be_given():
    ours, _ = _sides()
    unit = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    costs, units = mcw.hidden_costs(ours, ours, None, (COUNTS, COUNTS), [unit])
    assert costs[0][0].tolist() == [[float(a != b) for b in (3, 4, 3, 3, 5)] for a in (3, 4, 3, 3, 5)]
    torch.testing.assert_close(costs[1], mcw.l2_costs(ours.context, ours.context) / (unit + 1e-7)[:, None, None])
    assert units == [unit]
