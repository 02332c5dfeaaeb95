import pytest
import torch

from kdbench.losses.uld import sorted_l1


def _brute_force(z_s, z_t):
    """Probabilities as Python lists, sorted and padded one row at a time."""
    rows = []
    for s, t in zip(z_s.softmax(-1).tolist(), z_t.softmax(-1).tolist(), strict=True):
        s, t = sorted(s, reverse=True), sorted(t, reverse=True)
        longest = max(len(s), len(t))
        s, t = s + [0.0] * (longest - len(s)), t + [0.0] * (longest - len(t))
        rows.append(sum(abs(a - b) for a, b in zip(s, t, strict=True)))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("student", "teacher"), [(13, 13), (13, 29), (29, 13)])
def test_is_the_brute_force_distance(student, teacher):
    torch.manual_seed(0)
    z_s, z_t = 2 * torch.randn(20, student, dtype=torch.float64), 3 * torch.randn(20, teacher, dtype=torch.float64)
    torch.testing.assert_close(sorted_l1(z_s, z_t), _brute_force(z_s, z_t), rtol=1e-13, atol=1e-14)


def test_gradient_by_finite_differences():
    torch.manual_seed(1)
    z_s = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    z_t = torch.randn(3, 11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: sorted_l1(z, z_t), z_s)


def test_the_order_of_a_vocabulary_does_not_matter():
    torch.manual_seed(2)
    z_s, z_t = torch.randn(4, 8), torch.randn(4, 8)
    shuffled = z_t[:, torch.randperm(8)]
    torch.testing.assert_close(sorted_l1(z_s, shuffled), sorted_l1(z_s, z_t))
    assert sorted_l1(z_t, shuffled).abs().max() < 1e-6


def test_no_rows():
    assert sorted_l1(torch.zeros(0, 5), torch.zeros(0, 7)).shape == (0,)
