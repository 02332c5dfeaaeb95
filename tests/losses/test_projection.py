"""Least-squares maps between heads, against the pseudo-inverse of PyTorch."""

import pytest
import torch

from kdbench.losses import projection


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IDS = torch.randperm(40, generator=torch.Generator().manual_seed(4))[:30]


@pytest.mark.parametrize("chunk", [1, 7, 30, 2**13])
def test_cross_product(chunk, monkeypatch):
    monkeypatch.setattr(projection, "_CHUNK", chunk)
    one, other = _random(40, 5), _random(50, 7, seed=1)
    shared = torch.stack([IDS, IDS.flip(0) + 3], dim=1)
    found = projection.cross_product(one, other, shared, torch.float64)
    torch.testing.assert_close(found, one[shared[:, 0]].T @ other[shared[:, 1]])


def _pinv(weight):
    """By the singular values that `torch.linalg.pinv` drops in float32, the published type."""
    return torch.linalg.pinv(weight, rtol=max(weight.shape) * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("width", [5, 30, 36])
def test_factor_of_the_pseudo_inverse(width):
    weight = _random(40, width)
    factor = projection.inverse_factor(weight, IDS)
    found = factor @ factor.T @ weight[IDS].T
    torch.testing.assert_close(found, _pinv(weight[IDS]), rtol=1e-6, atol=1e-8)


def test_directions_without_weight_are_left_out():
    weight = _random(40, 6)
    weight[:, 4] = 2 * weight[:, 1]  # rank 5
    weight[:, 5] *= 1e-8  # below the cutoff
    factor = projection.inverse_factor(weight, IDS)
    found = factor @ factor.T @ weight[IDS].T
    torch.testing.assert_close(found, _pinv(weight[IDS]), rtol=1e-6, atol=1e-8)
    assert (factor.abs().sum(0) > 0).sum() == 4


def test_float32_and_bfloat16_weights():
    for dtype in (torch.float32, torch.bfloat16):
        weight = _random(40, 6).to(dtype)
        factor = projection.inverse_factor(weight, IDS)
        assert factor.dtype == torch.float64
        torch.testing.assert_close(factor, projection.inverse_factor(weight.double(), IDS), rtol=0, atol=0)
