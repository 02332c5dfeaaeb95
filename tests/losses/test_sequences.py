"""Padded sequences and partners of rows."""

import torch

from kdbench.losses.sequences import mask, mean_over, pad, partners, unpad


def test_pad_and_unpad():
    values, counts = torch.arange(12.0).reshape(6, 2).requires_grad_(), torch.tensor([1, 3, 2])
    padded = pad(values, counts)
    assert padded.shape == (3, 3, 2)
    assert padded[0].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert padded[~mask(counts)].eq(0).all()
    assert torch.equal(unpad(padded, counts), values)
    (gradient,) = torch.autograd.grad((unpad(padded, counts) * torch.arange(6)[:, None]).sum(), [values])
    assert gradient[:, 0].tolist() == list(range(6))


def test_partners():
    partner, paired = partners(torch.tensor([[3, 1], [0, 4], [2, 0]]), 5)
    assert partner.tolist() == [4, 0, 0, 1, 0]
    assert paired.tolist() == [True, False, True, True, False]


def test_no_partners():
    partner, paired = partners(torch.zeros(0, 2, dtype=torch.long), 3)
    assert partner.tolist() == [0, 0, 0]
    assert not paired.any()


def test_weights_of_a_mean_over_chosen_rows():
    chosen = torch.tensor([True, False, True, True, False, False, True, True])
    weights = mean_over(chosen, torch.tensor([3, 3, 2]), torch.float64)
    assert weights.tolist() == [1.5, 0, 1.5, 3, 0, 0, 1, 1]
    assert mean_over(chosen & False, torch.tensor([3, 3, 2]), torch.float64).tolist() == [0] * 8
