import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from kdbench.losses.ot import sinkhorn, sinkhorn_divergence

EXACT = {"tolerance": 1e-13, "iterations": 20_000, "check_every": 50}
sizes = st.integers(1, 9)
seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


def _costs(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _counts(*values):
    return torch.tensor(values)


def _one(cost, **arguments):
    """The transport of a single matrix without padding."""
    return sinkhorn(cost[None], _counts(cost.shape[0]), _counts(cost.shape[1]), **arguments)


def _linear_programme(cost):
    """min ⟨P, C⟩ with uniform masses, exactly."""
    n, m = cost.shape
    if n == m:
        return cost[linear_sum_assignment(cost)].mean()
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return linprog(cost.reshape(-1), A_eq=np.concatenate([rows, columns]), b_eq=masses).fun


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 4), (1, 6)])
def test_small_epsilon_approaches_the_linear_programme(n, m):
    """The gap is at most ε log min(n, m), the most that KL can be; masses that are off by Σ|error| move costs of at most 1 by no more."""
    cost = _costs(n, m, seed=n)
    optimum = _linear_programme(cost.numpy())
    gaps = []
    for epsilon in (0.3, 0.1, 0.03, 0.01, 0.003):
        found = _one(cost, epsilon=epsilon, relative=False, tolerance=1e-4, iterations=20_000, check_every=50)
        assert found.error.item() < 1.01e-4
        gaps.append(found.value.item() - optimum)
        assert -1.01e-4 < gaps[-1] < epsilon * math.log(min(n, m)) + 1.01e-4
    assert all(wider > narrower - 1e-4 for wider, narrower in itertools.pairwise(gaps))
    assert gaps[-1] < 0.01 * optimum


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("n", "m", "epsilon"), [(6, 6, 0.05), (5, 11, 0.2), (12, 3, 1.0)])
def test_is_the_plan_of_pot(n, m, epsilon, uniform):
    cost = _costs(n, m, seed=n + m)
    a, b = (torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, m))
    if not uniform:
        a, b = _costs(n, seed=1).softmax(0), (3 * _costs(m, seed=2)).softmax(0)
    masses = {} if uniform else {"row_masses": a[None], "column_masses": b[None]}
    found = _one(cost, epsilon=epsilon, relative=False, **EXACT, **masses)
    plan = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=20_000)
    torch.testing.assert_close(found.plan[0], plan, rtol=1e-9, atol=1e-13)
    kl = (plan * (plan / (a[:, None] * b)).log()).sum()
    assert found.value.item() == pytest.approx((plan * cost).sum().item(), rel=1e-10)
    assert found.entropic.item() == pytest.approx(((plan * cost).sum() + epsilon * kl).item(), rel=1e-10)
    potentials = (found.row_potential[0, :, None] + found.column_potential[0] - cost) / epsilon
    torch.testing.assert_close(found.plan[0], a[:, None] * b * potentials.exp())


def test_epsilon_is_relative_to_the_mean_of_a_sequences_own_cells():
    cost = _costs(2, 6, 8)
    rows, columns = _counts(4, 6), _counts(8, 5)
    means = torch.stack([cost[0, :4].mean(), cost[1, :, :5].mean()])
    found = sinkhorn(cost, rows, columns, epsilon=0.2, **EXACT)
    torch.testing.assert_close(found.epsilon, 0.2 * means)
    absolute = sinkhorn(cost, rows, columns, epsilon=0.2 * means, relative=False, **EXACT)
    torch.testing.assert_close(found.plan, absolute.plan)
    scaled = sinkhorn(1000 * cost, rows, columns, epsilon=0.2, **EXACT)
    torch.testing.assert_close(scaled.plan, found.plan)
    torch.testing.assert_close(scaled.value, 1000 * found.value)


def test_envelope_gradient_is_that_of_the_entropic_value():
    """Against differences of the converged value; both returned values have it, and it is the plan."""
    arguments = {"epsilon": 0.2, "relative": False, **EXACT}
    cost = _costs(4, 6, seed=3).requires_grad_()
    found = _one(cost, **arguments)
    for value in (found.value, found.entropic):
        (gradient,) = torch.autograd.grad(value.sum(), cost, retain_graph=True)
        torch.testing.assert_close(gradient, found.plan[0], rtol=1e-12, atol=0)
    step, differences = 1e-5, torch.zeros(4, 6, dtype=torch.float64)
    for i in range(4):
        for j in range(6):
            moved = torch.zeros(4, 6, dtype=torch.float64)
            moved[i, j] = step
            up, down = (_one(cost.detach() + sign * moved, **arguments).entropic for sign in (1, -1))
            differences[i, j] = ((up - down) / (2 * step)).item()
    torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-9)
    (unrolled,) = torch.autograd.grad(_one(cost, unrolled=True, **arguments).entropic.sum(), cost)
    torch.testing.assert_close(gradient, unrolled, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["value", "entropic"])
@pytest.mark.parametrize(
    "extra", [{}, {"rows_first": True}, {"floor": 1e-2}, {"row_masses": 1.0, "column_masses": 1.0}]
)
def test_unrolled_gradient_by_finite_differences(name, extra):
    cost = _costs(2, 4, 5, seed=4).requires_grad_()
    arguments = {"epsilon": 0.3, "relative": False, "iterations": 4, "tolerance": 0.0, "unrolled": True} | extra

    def run(cost):
        return getattr(sinkhorn(cost, _counts(3, 4), _counts(5, 2), **arguments), name)

    assert torch.autograd.gradcheck(run, cost)


@few
@given(
    n=sizes, m=sizes, more_rows=st.integers(0, 5), more_columns=st.integers(0, 5), unrolled=st.booleans(), seed=seeds
)
def test_padding_changes_nothing_and_is_never_read(n, m, more_rows, more_columns, unrolled, seed):
    cost = _costs(1, n, m, seed=seed).requires_grad_()
    padded = torch.full((1, n + more_rows, m + more_columns), torch.nan, dtype=torch.float64)
    padded[:, :n, :m] = cost.detach()
    padded.requires_grad_()
    alone = sinkhorn(cost, _counts(n), _counts(m), unrolled=unrolled)
    found = sinkhorn(padded, _counts(n), _counts(m), unrolled=unrolled)
    for name in ("value", "entropic", "error", "iterations", "epsilon"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-10, atol=1e-13)
    for name in ("plan", "row_potential", "column_potential"):
        got, want = getattr(found, name), getattr(alone, name)
        inside = tuple(slice(size) for size in want.shape)
        torch.testing.assert_close(got[inside], want, rtol=1e-10, atol=1e-12)
        assert got.abs().sum().item() == pytest.approx(want.abs().sum().item(), rel=1e-10)
    (of_padded,), (of_cost,) = (torch.autograd.grad(t.value.sum(), c) for t, c in ((found, padded), (alone, cost)))
    torch.testing.assert_close(of_padded[:, :n, :m], of_cost, rtol=1e-9, atol=1e-12)
    assert of_padded.abs().sum().item() == pytest.approx(of_cost.abs().sum().item(), rel=1e-9)


@few
@given(counts=st.lists(st.tuples(sizes, sizes), min_size=2, max_size=4), seed=seeds)
def test_a_sequence_does_not_depend_on_its_batch(counts, seed):
    rows, columns = (torch.tensor(side) for side in zip(*counts, strict=True))
    cost = _costs(len(counts), int(rows.max()), int(columns.max()), seed=seed) ** 4  # some converge soon, others late
    together = sinkhorn(cost, rows, columns, epsilon=0.05, check_every=1)
    for i, (n, m) in enumerate(counts):
        alone = _one(cost[i, :n, :m], epsilon=0.05, check_every=1)
        assert together.iterations[i] == alone.iterations[0]
        torch.testing.assert_close(together.plan[i, :n, :m], alone.plan[0], rtol=1e-10, atol=1e-14)


def test_a_converged_sequence_stands_still_while_others_go_on():
    easy, hard = torch.zeros(5, 5), _costs(5, 5, dtype=torch.float32) ** 8
    cost, five = torch.stack([easy, hard]), _counts(5, 5)
    found = sinkhorn(cost, five, five, epsilon=0.02, tolerance=1e-4, check_every=1)
    assert found.iterations[0] == 1
    assert found.iterations[1] > 10
    assert (found.error < 1.01e-4).all()


@few
@given(n=sizes, m=sizes, seed=seeds)
def test_the_order_of_positions_does_not_matter(n, m, seed):
    cost = _costs(n, m, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    found, shuffled = _one(cost), _one(cost[rows][:, columns])
    torch.testing.assert_close(shuffled.plan[0], found.plan[0][rows][:, columns], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(shuffled.value, found.value)


@few
@given(n=sizes, m=sizes, seed=seeds)
def test_transposed(n, m, seed):
    """Exactly so with the order of updates exchanged; at convergence without."""
    cost = _costs(n, m, seed=seed)
    found, turned = _one(cost), _one(cost.T, rows_first=True)
    torch.testing.assert_close(turned.plan[0], found.plan[0].T, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(turned.error, found.error, rtol=1e-6, atol=1e-13)
    found, turned = (_one(c, epsilon=0.3, **EXACT) for c in (cost, cost.T))
    torch.testing.assert_close(turned.plan[0], found.plan[0].T, rtol=1e-9, atol=1e-12)


@few
@given(n=sizes, m=sizes, epsilon=st.floats(0.05, 2), seed=seeds)
def test_masses_are_met_to_the_tolerance(n, m, epsilon, seed):
    cost = _costs(n, m, seed=seed, dtype=torch.float32)
    found = _one(cost, epsilon=epsilon, iterations=5000, tolerance=1e-3)
    assert found.error.item() < 1.01e-3
    assert (found.plan >= 0).all()
    torch.testing.assert_close(found.plan[0].sum(1), torch.full((n,), 1 / n), rtol=1e-5, atol=0)
    assert found.iterations.item() % 10 == 1


def test_stops_at_the_number_of_iterations():
    found = _one(_costs(8, 8), epsilon=0.01, iterations=3)
    assert found.iterations.item() == 3
    assert found.error.item() > 1e-3


@pytest.mark.parametrize("unrolled", [False, True])
def test_one_position_next_to_512(unrolled):
    cost = _costs(3, 512, 512, dtype=torch.float32).requires_grad_()
    rows, columns = _counts(1, 512, 1), _counts(1, 512, 512)
    found = sinkhorn(cost, rows, columns, unrolled=unrolled, iterations=11)
    found.value.sum().backward()
    assert found.value.isfinite().all()
    assert cost.grad.isfinite().all()
    # With one row or column there is one plan: everything goes there.
    torch.testing.assert_close(found.value[0], cost[0, 0, 0])
    torch.testing.assert_close(found.value[2], cost[2, 0].mean())
    torch.testing.assert_close(cost.grad[2, 0], torch.full((512,), 1 / 512))


@pytest.mark.parametrize("unrolled", [False, True])
def test_costs_of_zero(unrolled):
    """The plan is uniform, and what the cost is made of gets no gradient."""
    x = _costs(1, 4, 3, dtype=torch.float32).requires_grad_()
    cost = (x[:, :1, None] - x[:, None, :1].detach()).abs().sum(-1).expand(1, 5, 6)
    found = sinkhorn(cost, _counts(5), _counts(6), unrolled=unrolled)
    torch.testing.assert_close(found.plan, torch.full((1, 5, 6), 1 / 30))
    assert found.value.item() == 0
    assert found.entropic.item() == pytest.approx(0, abs=1e-6)
    found.value.sum().backward()
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_costs(scale):
    cost = _costs(5, 6, dtype=torch.float32)
    torch.testing.assert_close(_one(scale * cost).plan, _one(cost).plan, rtol=1e-4, atol=1e-7)


def test_nan_is_not_masked_away():
    cost = _costs(2, 4, 4)
    cost[0, 1, 2] = torch.nan
    found = sinkhorn(cost, _counts(4, 4), _counts(4, 4))
    assert found.value[0].isnan()
    assert found.value[1].isfinite()


def test_bfloat16_is_computed_in_float32():
    cost = _costs(2, 9, 7, dtype=torch.float32).to(torch.bfloat16).requires_grad_()
    counts = _counts(9, 4), _counts(7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(cost, *counts)
    want = sinkhorn(cost.detach().float(), *counts)
    assert found.value.dtype == found.plan.dtype == torch.float32
    torch.testing.assert_close(found.value, want.value, rtol=0, atol=0)
    found.value.sum().backward()
    torch.testing.assert_close(cost.grad, want.plan.to(torch.bfloat16))


def test_divergence_is_that_of_pot():
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(1, n, 3, generator=generator, dtype=torch.float64) for n in (6, 8))
    costs = [torch.cdist(a, b) ** 2 for a, b in ((x, y), (x, x), (y, y))]
    arguments = {"epsilon": 2.0, "relative": False, **EXACT}
    found = sinkhorn_divergence(*costs, _counts(6), _counts(8), entropic=False, **arguments)
    want = ot.bregman.empirical_sinkhorn_divergence(x[0], y[0], 2.0, stopThr=1e-13, numIterMax=20_000)
    assert found.value.item() == pytest.approx(want.item(), rel=1e-7)
    entropic = [_one(cost[0], **arguments).entropic.item() for cost in costs]
    found = sinkhorn_divergence(*costs, _counts(6), _counts(8), **arguments)
    assert found.value.item() == pytest.approx(entropic[0] - sum(entropic[1:]) / 2, rel=1e-12)


@few
@given(n=sizes, m=sizes, entropic=st.booleans(), seed=seeds)
def test_divergence_of_identical_inputs_is_zero_and_else_positive(n, m, entropic, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, size, 3, generator=generator, dtype=torch.float64) for size in (n, m))
    arguments = {"epsilon": 0.3, "entropic": entropic, "tolerance": 1e-10, "iterations": 5000}
    xx, yy = torch.cdist(x, x), torch.cdist(y, y)
    assert sinkhorn_divergence(xx, xx, xx, _counts(n), _counts(n), **arguments).value.item() == 0
    found = sinkhorn_divergence(torch.cdist(x, y), xx, yy, _counts(n), _counts(m), **arguments)
    if entropic:
        assert found.value.item() > -1e-8
    assert found.error.item() < 1.01e-10


def test_gradient_of_the_divergence_vanishes_at_identical_inputs():
    """That of ⟨P, C⟩ does not: the entropic plan is blurred and pulls positions together."""
    y = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = y.clone().requires_grad_()
    six = _counts(6)
    squared = [((a[:, :, None] - b[:, None]) ** 2).sum(-1) for a, b in ((x, y), (x, x), (y, y))]
    found = sinkhorn_divergence(*squared, six, six, epsilon=0.3, tolerance=1e-13, iterations=5000)
    (gradient,) = torch.autograd.grad(found.value.sum(), x, retain_graph=True)
    assert gradient.abs().max() < 1e-10
    (biased,) = torch.autograd.grad(sinkhorn(squared[0], six, six, epsilon=0.3).value.sum(), x)
    assert biased.abs().max() > 1e-2
