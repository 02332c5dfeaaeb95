import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from kdbench.losses.ot import cost_weights, project_to_simplex


def _by_solver(linear, sigma, size, floor):
    """argmin of Σ_k a_k l_k + σ Σ_k a_k² on the simplex with a floor, by sequential quadratic programming."""
    found = minimize(
        lambda a: a @ linear + sigma * (a**2).sum(),
        np.full(size, 1 / size),
        jac=lambda a: linear + 2 * sigma * a,
        method="SLSQP",
        bounds=[(floor, 1)] * size,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("seed", range(8))
def test_projection_and_weights_are_those_of_a_solver(seed):
    generator = torch.Generator().manual_seed(seed)
    size, floor, sigma = 2 + seed % 5, (0.0, 0.01, 0.1)[seed % 3], (0.7, 2.0)[seed % 2]
    point = torch.randn(size, generator=generator, dtype=torch.float64)
    want = _by_solver(-2 * point.numpy(), 1.0, size, floor)
    np.testing.assert_allclose(project_to_simplex(point, floor).numpy(), want, atol=1e-6)
    costs = 3 * torch.rand(size, generator=generator, dtype=torch.float64)
    want = _by_solver(costs.numpy() - 2 * sigma / size, sigma, size, floor)
    np.testing.assert_allclose(cost_weights(costs, sigma, floor).numpy(), want, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 7), share=st.floats(0, 1), scale=st.floats(0.01, 100), seed=st.integers(0, 10_000))
def test_projection_is_nearest(size, share, scale, seed):
    """It lies in the set, and no corner of the set lies on the point's side of it."""
    floor = share / size
    point = scale * torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = project_to_simplex(point, floor)
    torch.testing.assert_close(found.sum(-1), torch.ones(3).double())
    assert (found >= floor).all()
    corners = floor + (1 - size * floor) * torch.eye(size).double()
    towards = ((point - found)[:, None] * (corners - found[:, None])).sum(-1)
    assert (towards < 1e-9 * scale).all()
    torch.testing.assert_close(project_to_simplex(found, floor), found, rtol=1e-9, atol=1e-12)


def test_cost_weights_favour_the_lower_cost():
    costs = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.4, 9.0]])
    weights = cost_weights(costs, 2.0, 0.01)
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))
    assert weights[1, 0] > weights[1, 1] > weights[1, 2] == pytest.approx(0.01)
    torch.testing.assert_close(cost_weights(costs, 1e9, 0.01), torch.full((2, 3), 1 / 3))


def test_a_floor_that_leaves_nothing():
    with pytest.raises(ValueError, match=r"3 weights of at least 0\.4 sum to more than 1"):
        project_to_simplex(torch.zeros(3), 0.4)
