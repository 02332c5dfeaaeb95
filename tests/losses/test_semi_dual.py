import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from kdbench.losses.ot import sinkhorn
from kdbench.losses.semi_dual import (
    PUBLISHED_SEMI_DUAL,
    PotentialNetwork,
    ascend,
    semi_dual,
    semi_dual_potentials,
)

EXACT = {"tolerance": 1e-13, "iterations": 20_000, "check_every": 20}
EPSILON = 0.2
sizes = st.integers(1, 8)
few = settings(max_examples=20, deadline=None)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _counts(*values):
    return torch.tensor(values)


def _weights(count, seed=0):
    return (2 * _random(count, seed=seed)).softmax(0)


def _maximum(costs, weights, *counts, epsilon=EPSILON, **arguments):
    """The exact potentials, and the semi-dual there."""
    found = semi_dual_potentials(costs, weights, *counts, epsilon=epsilon, **arguments)
    return found, semi_dual(costs, weights, found.row_potential, *counts, epsilon=found.epsilon)


def test_is_the_formula():
    """One sequence, cost and column at a time."""
    costs, weights, potential = _random(3, 1, 4, 5), _weights(3), _random(1, 4, seed=1)
    found = semi_dual(costs, weights, potential, _counts(4), _counts(5), epsilon=EPSILON)
    for k in range(3):
        transformed = [
            -EPSILON * math.log(np.mean([math.exp((potential[0, i] - costs[k, 0, i, j]) / EPSILON) for i in range(4)]))
            for j in range(5)
        ]
        assert found.per_cost[k, 0].item() == pytest.approx(potential.mean().item() + np.mean(transformed), rel=1e-12)
    assert found.value.item() == pytest.approx((weights @ found.per_cost[:, 0]).item(), rel=1e-12)


def test_the_potential_is_the_maximum_of_a_solver():
    costs, weights, counts = _random(3, 1, 5, 7), _weights(3), (_counts(5), _counts(7))
    transport, found = _maximum(costs, weights, *counts, **EXACT)

    def negative(phi):
        phi = torch.tensor(phi[None], requires_grad=True)
        value = -semi_dual(costs, weights, phi, *counts, epsilon=EPSILON).value.sum()
        return value.item(), torch.autograd.grad(value, phi)[0][0].numpy()

    solved = minimize(negative, np.zeros(5), jac=True, options={"gtol": 1e-10})
    assert found.value.item() == pytest.approx(-solved.fun, rel=1e-9)
    centred = transport.row_potential[0] - transport.row_potential[0].mean()
    np.testing.assert_allclose(centred.numpy(), solved.x - solved.x.mean(), atol=1e-6)


def test_the_maximum_is_the_least_cost_of_the_primal():
    """Σ_k α_k P_k has the rows' masses, each P_k the columns', and L is what they cost."""
    costs, weights = _random(3, 1, 5, 7), _weights(3)
    transport, found = _maximum(costs, weights, _counts(5), _counts(7), **EXACT)
    plans = transport.plan[0].unflatten(1, (3, 7)).movedim(1, 0) / weights[:, None, None]
    torch.testing.assert_close((weights[:, None] * plans.sum(2)).sum(0), torch.full((5,), 0.2).double())
    torch.testing.assert_close(plans.sum(1), torch.full((3, 7), 1 / 7).double(), rtol=1e-6, atol=0)
    kl = (plans * (35 * plans).log()).sum((1, 2))
    primal = (weights * ((plans * costs[:, 0]).sum((1, 2)) + EPSILON * kl)).sum()
    assert found.value.item() == pytest.approx(primal.item(), rel=1e-7)
    assert found.value.item() == pytest.approx(transport.entropic.item(), rel=1e-10)
    # Rows need the masses only on average, so several costs are never dearer than their mean as one cost.
    one = sinkhorn(
        (weights[:, None, None, None] * costs).sum(0), _counts(5), _counts(7), epsilon=EPSILON, relative=False
    )
    assert found.value.item() < one.entropic.item()


@few
@given(n=sizes, m=sizes, relative=st.booleans(), seed=st.integers(0, 10_000))
def test_one_cost_is_sinkhorn(n, m, relative, seed):
    cost, counts = _random(1, n, m, seed=seed), (_counts(n), _counts(m))
    arguments = {"relative": relative, "tolerance": 1e-12, "iterations": 5000}
    transport, found = _maximum([cost], torch.ones(1), *counts, **arguments)
    want = sinkhorn(cost, *counts, epsilon=EPSILON, **arguments)
    torch.testing.assert_close(transport.plan, want.plan, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(transport.epsilon, want.epsilon)
    torch.testing.assert_close(found.value, want.entropic, rtol=1e-8, atol=1e-10)


@few
@given(count=st.integers(1, 4), n=sizes, m=sizes, epsilon=st.floats(0.02, 1), seed=st.integers(0, 10_000))
def test_no_update_lowers_the_value(count, n, m, epsilon, seed):
    costs, weights, counts = _random(count, 1, n, m, seed=seed), _weights(count, seed), (_counts(n), _counts(m))
    before = -torch.inf
    for iterations in range(1, 12):
        _, found = _maximum(costs, weights, *counts, epsilon=epsilon, iterations=iterations, tolerance=0.0)
        assert found.value.item() >= before - 1e-12
        before = found.value.item()


def test_the_update_is_the_documented_one():
    costs, weights, counts = _random(3, 1, 5, 7), _weights(3), (_counts(5), _counts(7))
    before, after = (
        semi_dual_potentials(costs, weights, *counts, epsilon=EPSILON, iterations=i, tolerance=0.0) for i in (4, 5)
    )
    step = EPSILON * (-np.log(5) - before.plan.sum(2).log())
    torch.testing.assert_close(after.row_potential, before.row_potential + step)


def test_envelope_gradients_are_those_of_the_maximum():
    """Against differences of the converged maximum: of every cost, and of the weights along the simplex."""
    costs, weights, counts = (
        _random(2, 1, 3, 4).requires_grad_(),
        _weights(2).requires_grad_(),
        (_counts(3), _counts(4)),
    )
    transport, found = _maximum(costs, weights, *counts, **EXACT)
    assert not transport.row_potential.requires_grad
    of_costs, of_weights = torch.autograd.grad(found.value.sum(), (costs, weights))
    torch.testing.assert_close(of_costs[:, 0], transport.plan[0].unflatten(1, (2, 4)).movedim(1, 0), rtol=1e-7, atol=0)
    step = 1e-5

    def slope(of_cost, of_weight):
        values = [
            _maximum(costs.detach() + s * of_cost, weights.detach() + s * of_weight, *counts, **EXACT)[1].value.item()
            for s in (step, -step)
        ]
        return (values[0] - values[1]) / (2 * step)

    for index in np.ndindex(2, 1, 3, 4):
        moved = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
        moved[index] = 1
        assert of_costs[index].item() == pytest.approx(slope(moved, 0.0), rel=1e-6, abs=1e-9)
    along = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert (of_weights @ along).item() == pytest.approx(slope(0.0, along), rel=1e-6)
    torch.testing.assert_close(of_weights @ along, (found.per_cost[:, 0] @ along).detach())


@pytest.mark.parametrize("extra", [{}, {"clamp": 2.0, "floor": 0.1}])
def test_gradients_of_the_value_by_finite_differences(extra):
    leaves = [_random(2, 2, 4, 5), _weights(2), _random(2, 4, seed=2)]

    def run(costs, weights, potential):
        found = semi_dual(costs, weights, potential, _counts(3, 4), _counts(5, 2), epsilon=EPSILON, **extra)
        return found.value, found.per_cost

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


@few
@given(sides=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_and_the_batch_change_nothing(sides, more, seed):
    rows, columns = (torch.tensor(side) for side in zip(*sides, strict=True))
    weights = _weights(2, seed)
    costs = torch.full((2, len(sides), int(rows.max()) + more, int(columns.max()) + more), torch.nan).double()
    for i, (n, m) in enumerate(sides):
        costs[:, i, :n, :m] = _random(2, n, m, seed=seed + i)
    costs.requires_grad_()
    together, found = _maximum(list(costs), weights, rows, columns)
    (gradient,) = torch.autograd.grad(found.value.sum(), costs)
    for i, (n, m) in enumerate(sides):
        alone, want = _maximum(costs[:, i : i + 1, :n, :m], weights, _counts(n), _counts(m))
        torch.testing.assert_close(together.row_potential[i, :n], alone.row_potential[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.value[i], want.value[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.per_cost[:, i], want.per_cost[:, 0], rtol=1e-9, atol=1e-12)
        assert together.row_potential[i, n:].abs().sum() == 0
        assert gradient[:, i].abs().sum().item() == pytest.approx(1, rel=1e-9)


def test_a_weight_of_zero_leaves_its_cost_out():
    costs, counts = _random(3, 1, 4, 6), (_counts(4), _counts(6))
    weights = torch.tensor([0.3, 0.0, 0.7], dtype=torch.float64)
    _, found = _maximum(costs, weights, *counts, **EXACT)
    _, want = _maximum(costs[[0, 2]], weights[[0, 2]], *counts, **EXACT)
    torch.testing.assert_close(found.value, want.value)
    assert found.per_cost.isfinite().all()


def test_bfloat16_is_computed_in_float32():
    costs = _random(2, 1, 5, 6).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        transport, found = _maximum(costs, torch.tensor([0.5, 0.5]), _counts(5), _counts(6))
    _, want = _maximum(costs.float(), torch.tensor([0.5, 0.5]), _counts(5), _counts(6))
    assert found.value.dtype == transport.row_potential.dtype == torch.float32
    torch.testing.assert_close(found.value, want.value, rtol=0, atol=0)


def test_the_published_constants_hardly_matter():
    """They bound exponents that are far from their bounds, for costs of at most 1."""
    costs, weights, counts = _random(3, 1, 5, 7), _weights(3), (_counts(5), _counts(7))
    potential = 2 * _random(1, 5, seed=1) - 1
    published = semi_dual(costs, weights, potential, *counts, **PUBLISHED_SEMI_DUAL)
    exact = semi_dual(costs, weights, potential, *counts, epsilon=PUBLISHED_SEMI_DUAL["epsilon"])
    torch.testing.assert_close(published.value, exact.value, rtol=1e-8, atol=1e-9)
    published = semi_dual(50 * costs, weights, potential, *counts, **PUBLISHED_SEMI_DUAL)
    exact = semi_dual(50 * costs, weights, potential, *counts, epsilon=PUBLISHED_SEMI_DUAL["epsilon"])
    assert (published.value - exact.value).abs().item() > 0.1


def _network(seed=0):
    torch.manual_seed(seed)
    return PotentialNetwork(4, hidden=8).double()


def test_network_ignores_padding():
    network, states = _network(), _random(2, 6, 4)
    found = network(states, _counts(3, 6))
    assert found.abs().max() < 1
    assert found[0, 3:].abs().sum() == 0
    torch.testing.assert_close(found[:1, :3], network(states[:1, :3], _counts(3)))
    torch.testing.assert_close(found[1:], network(states[1:], _counts(6)))


def test_a_network_ascends_towards_the_exact_potential_and_never_past_it():
    network, states = _network(), _random(1, 5, 4)
    costs, weights, counts = _random(3, 1, 5, 7), _weights(3), (_counts(5), _counts(7))

    def value():
        return semi_dual(costs, weights, network(states, counts[0]), *counts, epsilon=EPSILON).value.sum()

    values = [value().item()]
    for _ in range(5):
        ascend(network, value, steps=20, learning_rate=0.1)
        values.append(value().item())
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.005
    _, best = _maximum(costs, weights, *counts, **EXACT)
    assert values[-1] < best.value.item()


def test_a_step_is_clipped_and_earlier_graphs_keep_their_weights():
    network, states = _network(), _random(1, 5, 4).requires_grad_()
    (want,) = torch.autograd.grad(network(states, _counts(5)).sum(), states)
    earlier = network(states, _counts(5)).sum()
    before = network.combine.bias.detach().clone()
    ascend(network, lambda: 1e6 * network(states, _counts(5)).sum(), steps=3, learning_rate=0.01, clip=1.0)
    torch.testing.assert_close(network.combine.bias.detach(), before + 0.03)
    torch.testing.assert_close(torch.autograd.grad(earlier, states)[0], want, rtol=0, atol=0)
