import math

import pytest
import torch

from kdbench.losses import divergences
from kdbench.losses.divergences import OBJECTIVES

every = pytest.mark.parametrize("name", OBJECTIVES)


def _logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _plain(name, z_s, z_t, temperature=1.0, skew_lambda=0.1, adaptive_alpha=0.5):
    """The formulas of docs/methods.md on probabilities, one row and one token at a time."""
    q, p = (z_s / temperature).softmax(-1), (z_t / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum()

    def of_row(p, q):
        match name:
            case "forward_kl":
                return kl(p, q)
            case "reverse_kl":
                return kl(q, p)
            case "js_divergence":
                return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)
            case "skewed_forward_kl":
                return kl(p, skew_lambda * p + (1 - skew_lambda) * q)
            case "skewed_reverse_kl":
                return kl(q, (1 - skew_lambda) * p + skew_lambda * q)
            case "total_variation":
                return 0.5 * (p - q).abs().sum()
            case "adaptive_kl":
                reached, tail, head = 0.0, 0.0, 0.0
                for p_v, q_v in sorted(zip(p.tolist(), q.tolist(), strict=True)):
                    reached += p_v
                    if reached <= adaptive_alpha:
                        tail += abs(p_v - q_v)
                    else:
                        head += abs(p_v - q_v)
                weight = head / (head + tail)
                return weight * kl(p, q) + (1 - weight) * kl(q, p)

    return torch.stack([of_row(*row) for row in zip(p, q, strict=True)])


@every
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(name, temperature):
    z_s, z_t = _logits(6, 19, seed=1).requires_grad_(), _logits(6, 19, seed=2)
    ours, plain = OBJECTIVES[name](z_s, z_t, temperature), _plain(name, z_s, z_t, temperature)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.arange(1.0, 7.0, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, z_s, upstream)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("skewed_forward_kl", {"skew_lambda": 0.6}),
        ("skewed_reverse_kl", {"skew_lambda": 0.6}),
        ("adaptive_kl", {"adaptive_alpha": 0.9}),
    ],
)
def test_options(name, option):
    z_s, z_t = _logits(6, 19, seed=1), _logits(6, 19, seed=2)
    ours = OBJECTIVES[name](z_s, z_t, **option)
    torch.testing.assert_close(ours, _plain(name, z_s, z_t, **option), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, OBJECTIVES[name](z_s, z_t))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_at_equal_distributions(name, dtype):
    logits = _logits(5, 300, scale=8.0, dtype=dtype)
    student = logits.clone().requires_grad_()
    loss = OBJECTIVES[name](student, logits, 2.0)
    loss.sum().backward()
    rounding = 10 * torch.finfo(dtype).eps
    assert loss.abs().max() <= rounding
    assert student.grad.abs().max() <= rounding  # also: it is finite


@every
def test_positive_for_different_distributions_and_blind_to_a_shift(name):
    z_s, z_t = _logits(50, 11, seed=3), _logits(50, 11, seed=4)
    loss = OBJECTIVES[name](z_s, z_t)
    assert (loss > 0).all()
    torch.testing.assert_close(OBJECTIVES[name](z_s + 7.0, z_t - 3.0), loss, rtol=1e-12, atol=1e-12)


def test_relations_between_objectives():
    z_s, z_t = _logits(8, 23, seed=5), _logits(8, 23, seed=6)
    torch.testing.assert_close(divergences.reverse_kl(z_s, z_t), divergences.forward_kl(z_t, z_s))
    torch.testing.assert_close(divergences.js_divergence(z_s, z_t), divergences.js_divergence(z_t, z_s))
    torch.testing.assert_close(divergences.skewed_reverse_kl(z_s, z_t), divergences.skewed_forward_kl(z_t, z_s))
    assert (divergences.js_divergence(50 * z_s, 50 * z_t) <= math.log(2) + 1e-12).all()
    assert (divergences.total_variation(50 * z_s, 50 * z_t) <= 1).all()


@every
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_masked_tokens(name, masked):
    """-inf on either side: the mixtures and total variation give it probability 0, the KLs leave the token out."""
    z_s, z_t = _logits(4, 9, seed=7), _logits(4, 9, seed=8)
    if masked in ("student", "both"):
        z_s[:, 2] = -torch.inf
    if masked in ("teacher", "both"):
        z_t[:, 2] = -torch.inf
    student = z_s.clone().requires_grad_()
    loss = OBJECTIVES[name](student, z_t)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    q, p = z_s.softmax(-1), z_t.softmax(-1)

    def kl(a, b):
        return torch.where((a == 0) | (b == 0), 0.0, a * (a / b).log()).sum(-1)

    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js_divergence": 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skewed_forward_kl": kl(p, 0.1 * p + 0.9 * q),
        "skewed_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
    }
    if name in expected:
        torch.testing.assert_close(loss, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("masked", ["neither", "student", "teacher", "both"])
@pytest.mark.parametrize("learner", ["student", "teacher"])
def test_gradients_of_either_side_beside_masked_tokens(name, masked, learner):
    """As autograd has them where the masked token is taken out of the tensors instead."""
    z = {"student": _logits(4, 9, seed=7), "teacher": _logits(4, 9, seed=8)}
    left, right = ("teacher", "student") if name == "forward_kl" else ("student", "teacher")
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    z[learner].requires_grad_()
    log = {}
    for side, logits in z.items():
        out = masked in (side, "both")
        log[side] = logits[:, kept].log_softmax(-1) if out else logits.log_softmax(-1)
        if masked != "neither" and not out:
            log[side] = log[side][:, kept]
    plain = (log[left].exp() * (log[left] - log[right])).sum(-1)
    hidden = torch.zeros(9, dtype=torch.float64)
    hidden[2] = -torch.inf
    given = {side: logits + hidden if masked in (side, "both") else logits for side, logits in z.items()}
    ours = OBJECTIVES[name](given["student"], given["teacher"])
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.arange(1.0, 5.0, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, z[learner], upstream)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_broken_logit_breaks_its_row_alone(name, bad, where):
    z = {"student": _logits(3, 7, seed=9), "teacher": _logits(3, 7, seed=10)}
    z[where][1, 4] = bad
    loss = OBJECTIVES[name](z["student"], z["teacher"])
    assert loss.isnan().tolist() == [False, True, False]


@every
def test_far_apart_logits_stay_finite_in_float32(name):
    z_s = _logits(4, 9, seed=11, scale=2000.0, dtype=torch.float32).requires_grad_()
    z_t = _logits(4, 9, seed=12, scale=2000.0, dtype=torch.float32)
    loss = OBJECTIVES[name](z_s, z_t)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert z_s.grad.isfinite().all()
