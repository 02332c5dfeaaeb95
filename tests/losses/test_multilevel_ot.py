import math

import pytest
import torch

from kdbench.losses.multilevel_ot import (
    absolute_difference,
    by_deviation,
    log_loss,
    log_probabilities_of,
    matched_columns,
    sequence_means,
    top_tokens,
    transport_cost,
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _probabilities(*shape, seed=0):
    return (2 * _random(*shape, seed=seed)).softmax(-1)


def test_the_mean_state_ranks_tokens_as_their_summed_logits_do():
    counts = torch.tensor([1, 5, 3])
    hidden, weight, bias = _random(9, 4), _random(13, 4, seed=1), _random(13, seed=2)
    ours = top_tokens(sequence_means(hidden, counts) @ weight.T + bias, 6)
    for tokens, rows in zip(ours, (hidden @ weight.T + bias).split(counts.tolist()), strict=True):
        assert tokens.tolist() == rows.sum(0).argsort(descending=True)[:6].tolist()


def test_means_are_of_one_sequence_and_in_float32_or_wider():
    counts = torch.tensor([2, 1])
    values = torch.tensor([[1.0, 4.0], [3.0, 0.0], [7.0, 7.0]], dtype=torch.bfloat16)
    assert torch.equal(sequence_means(values, counts), torch.tensor([[2.0, 2.0], [7.0, 7.0]]))
    assert sequence_means(values[:, 0].double(), counts).tolist() == [2.0, 7.0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_probabilities_are_of_the_whole_vocabulary(temperature):
    logits = 3 * _random(5, 17)
    tokens = torch.stack([torch.randperm(17)[:4] for _ in range(5)])
    ours = log_probabilities_of(logits, tokens, temperature)
    torch.testing.assert_close(ours, (logits / temperature).softmax(-1).log().gather(1, tokens))
    assert (ours.exp().sum(-1) < 1).all()


def test_the_terms_of_two_small_distributions():
    s, t = torch.tensor([0.7, 0.2]), torch.tensor([0.4, 0.5])
    assert absolute_difference(s, t).item() == pytest.approx(0.3 + 0.3)
    assert log_loss(s.log(), t).item() == pytest.approx(-0.4 * math.log(0.7) - 0.5 * math.log(0.2))
    cost = transport_cost(torch.stack([s, t])[None], torch.stack([t, s, torch.zeros(2)])[None])
    torch.testing.assert_close(cost, torch.tensor([[[0.6, 0.0, 0.9], [0.0, 0.6, 0.9]]]))


def test_terms_are_within_their_bounds_and_vanish_for_equal_distributions():
    s, t = _probabilities(40, 6), _probabilities(40, 6, seed=1)
    assert (absolute_difference(s, t) <= 2).all()
    assert not absolute_difference(t, t).any()
    assert (log_loss(s.log(), t) > log_loss(t.log(), t)).all()
    assert (transport_cost(s[None], t[None]) <= 2).all()
    assert not transport_cost(t[None], t[None])[0].diagonal().any()


def test_gradients_by_finite_differences():
    logits, p = _random(2, 9).requires_grad_(), _probabilities(2, 4, seed=1)
    tokens = torch.tensor([[3, 0, 8, 1], [2, 5, 4, 6]])

    def terms(logits):
        log_s = log_probabilities_of(by_deviation(logits), tokens, 2.0)
        cost = transport_cost(log_s.exp()[None], p[None])
        return absolute_difference(log_s.exp(), p), log_loss(log_s, p), cost

    assert torch.autograd.gradcheck(terms, logits)


def test_by_deviation_is_not_changed_by_the_scale_of_logits():
    logits = _random(3, 50)
    scaled = by_deviation(logits)
    torch.testing.assert_close(scaled.std(-1), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(by_deviation(100 * logits), scaled, rtol=1e-3, atol=0)
    torch.testing.assert_close(by_deviation(logits, 0.0) * logits.std(-1, keepdim=True), logits)


def test_columns_are_matched_one_after_the_other():
    """Against the loops that the definition spells out; the gradient goes to the columns that were chosen."""
    student, teacher = _probabilities(3, 4, 9).requires_grad_(), _probabilities(3, 4, 6, seed=1)
    matched = matched_columns(student, teacher)
    for s, t, ours in zip(student, teacher, matched, strict=True):
        free = list(range(9))
        for column in range(6):
            best = min(free, key=lambda j: (s[:, j] - t[:, column]).abs().sum().item())
            free.remove(best)
            assert torch.equal(ours[:, column], s[:, best])
    (gradient,) = torch.autograd.grad(matched.sum(), student)
    assert gradient.unique().tolist() == [0.0, 1.0]
    assert gradient.sum().item() == 3 * 4 * 6


def test_a_permuted_copy_is_matched_to_itself():
    teacher = _probabilities(1, 5, 7)
    assert torch.equal(matched_columns(teacher[..., torch.randperm(7)], teacher), teacher)


def test_no_rows():
    assert absolute_difference(torch.zeros(0, 5), torch.zeros(0, 5)).sum() == 0
    assert log_loss(torch.zeros(0, 5), torch.zeros(0, 5)).sum() == 0
