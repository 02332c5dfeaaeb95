"""The divergences of two outcomes, and the log-probabilities that they need."""

import math

import pytest
import torch

from kdbench.losses import alm

TAU = 100.0
OBJECTIVES = {name: lambda q, p, f=f: f(q, p, TAU) for name, f in alm.OBJECTIVES.items()} | alm.LIMITS
every = pytest.mark.parametrize("name", OBJECTIVES)


def _log_probabilities(count=40, seed=0, dtype=torch.float64):
    """From almost 1 to very small ones."""
    generator = torch.Generator().manual_seed(seed)
    return -(10 ** (6 * torch.rand(count, generator=generator, dtype=dtype) - 3))


def _plain(name, log_q, log_p):
    q, p = (log_q / TAU).exp(), (log_p / TAU).exp()
    match name:
        case "forward_kl":
            return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        case "reverse_kl":
            return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        case "total_variation":
            return 0.5 * ((p - q).abs() + ((1 - p) - (1 - q)).abs())
        case "forward_kl_limit":
            return log_p - log_q + log_p * (log_q / log_p).log()
        case "total_variation_limit":
            return (log_p - log_q).abs()


@every
def test_value_and_gradient_are_those_of_the_formula(name):
    log_q, log_p = _log_probabilities(seed=1).requires_grad_(), _log_probabilities(seed=2)
    ours, plain = OBJECTIVES[name](log_q, log_p), _plain(name, log_q, log_p)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), log_q)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-13)


@every
def test_gradient_by_finite_differences(name):
    log_p = -torch.tensor([0.01, 0.5, 3.0, 40.0], dtype=torch.float64)
    log_q = -torch.tensor([0.2, 0.1, 9.0, 60.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(OBJECTIVES[name], (log_q.requires_grad_(), log_p))


@every
def test_nothing_at_equal_probabilities_and_more_elsewhere(name):
    log_p = _log_probabilities(seed=3)
    log_q = log_p.clone().requires_grad_()
    loss = OBJECTIVES[name](log_q, log_p)
    (gradient,) = torch.autograd.grad(loss.sum(), log_q)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert (OBJECTIVES[name](factor * log_p, log_p) > 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "total_variation"])
def test_limits_are_those_of_high_temperatures(name):
    log_q, log_p, tau = -torch.rand(20, dtype=torch.float64) - 0.1, -torch.rand(20, dtype=torch.float64) - 0.1, 1e5
    high = tau * alm.OBJECTIVES[name](log_q, log_p, tau)
    torch.testing.assert_close(high, alm.LIMITS[f"{name}_limit"](log_q, log_p), rtol=1e-4, atol=1e-5)


def test_the_published_loss_is_the_binary_cross_entropy_with_its_epsilon():
    """tokenkit's `binary_ce`: the same gradient, and the value without the teacher's entropy."""
    log_q, log_p, epsilon = _log_probabilities(seed=4).requires_grad_(), _log_probabilities(seed=5), 1e-6
    q, p = (log_q / TAU - epsilon).exp(), (log_p / TAU - epsilon).exp()
    published = -(p * q.log() + (1 - p) * (1 - q).log())
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    ours = alm.forward_kl(log_q, log_p, TAU, epsilon=epsilon)
    torch.testing.assert_close(ours + entropy, published, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), log_q)[0] for loss in (ours, published)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_without_the_epsilon_almost_certain_chunks_still_count():
    """Where p and q are above 1 - τ · 1e-6 the published number is close to nothing; the formula's is not."""
    log_q, log_p = torch.tensor([-1e-5], dtype=torch.float64), torch.tensor([-1e-6], dtype=torch.float64)
    exact = alm.forward_kl(log_q, log_p, TAU)
    torch.testing.assert_close(TAU * exact, alm.forward_kl_limit(log_q, log_p), rtol=1e-6, atol=0)
    assert exact > 10 * alm.forward_kl(log_q, log_p, TAU, epsilon=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(name, dtype):
    """Probabilities of 0 and 1, smallest and largest ones, in all pairs: the loss, and its gradient."""
    ends = torch.tensor([0.0, -0.0, -1e-38, -1e-7, -1.0, -1e4, -1e30, -math.inf], dtype=dtype)
    log_q, log_p = (of.flatten() for of in torch.meshgrid(ends, ends, indexing="ij"))
    log_q = log_q.clone().requires_grad_()
    loss = OBJECTIVES[name](log_q, log_p)
    (gradient,) = torch.autograd.grad(loss.sum(), log_q)
    # A student's probability of exactly 0 has an infinite cross entropy too; the limit of a teacher's is infinite by its formula.
    defined = (log_p != -math.inf) | (name != "forward_kl_limit")
    assert loss[defined].isfinite().all()
    assert gradient[defined & (log_q != -math.inf)].isfinite().all()
    assert (loss[log_q == log_p] == 0).all()


@every
def test_nan_stays(name):
    nan, one = torch.tensor([math.nan]), torch.tensor([-1.0])
    assert OBJECTIVES[name](nan, one).isnan().all()
    assert OBJECTIVES[name](one, nan).isnan().all()


def test_log_probabilities_are_those_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 17, generator=generator, dtype=torch.float64)
    targets, tokens = torch.randint(17, (9,), generator=generator), torch.rand(17, generator=generator) < 0.4
    plain = logits.log_softmax(-1)
    ours = alm.log_probability(logits, targets)
    torch.testing.assert_close(ours, plain.gather(-1, targets[:, None]).squeeze(-1), rtol=1e-12, atol=1e-14)
    any_of = alm.log_probability_of_any(logits, tokens)
    torch.testing.assert_close(any_of, plain[:, tokens].exp().sum(-1).log(), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: alm.log_probability(z, targets), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda z: alm.log_probability_of_any(z, tokens), logits)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_precise_where_a_token_is_almost_certain(gap):
    """In float32: 1 - p is exp(-gap), far below the distance of 1 to its neighbours; the gradient as exact."""
    logits = torch.tensor([[gap, 0.0, -math.inf]], requires_grad=True)
    certain, first = torch.zeros(1, dtype=torch.long), torch.tensor([True, False, False])
    for found in (alm.log_probability(logits, certain), alm.log_probability_of_any(logits, first)):
        assert found.item() == pytest.approx(-math.log1p(math.exp(-gap)), rel=1e-5)
        (gradient,) = torch.autograd.grad(found, logits)
        slope = math.exp(-gap) / (1 + math.exp(-gap))
        assert gradient[0].tolist() == pytest.approx([slope, -slope, 0.0], rel=1e-5)


@every
@pytest.mark.parametrize("gap", [20.0, 60.0])
def test_gradients_of_logits_where_the_student_is_almost_certain(name, gap):
    """1/(1 - q) and dq/dz are huge and tiny there, their product is not: float32 gives what float64 gives."""
    found = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[gap, 0.0, 1.0]], dtype=dtype, requires_grad=True)
        log_q = alm.log_probability(logits, torch.zeros(1, dtype=torch.long))
        loss = OBJECTIVES[name](log_q, torch.tensor([-0.5], dtype=dtype)).sum()
        found.append(torch.autograd.grad(loss, logits)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)
    if "kl" in name and name != "reverse_kl":
        assert found[1].abs().max() > 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_logits_that_are_no_numbers_make_the_row_nan(bad, where):
    logits = torch.zeros(2, 3)
    logits[0, where] = bad
    for found in (
        alm.log_probability(logits, torch.zeros(2, dtype=torch.long)),
        alm.log_probability_of_any(logits, torch.tensor([True, False, False])),
    ):
        assert found.isnan().tolist() == [True, False]


def test_impossible_and_only_tokens():
    logits = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]], requires_grad=True)
    found = alm.log_probability(logits, torch.zeros(2, dtype=torch.long))
    assert found.tolist() == [-math.inf, 0.0]
    assert alm.log_probability_of_any(logits, torch.tensor([True, True])).tolist() == [0.0, 0.0]


def test_what_follows_a_chunk():
    chunks, sequence = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1])
    begins = -torch.arange(1.0, 7.0)
    # after rows 1, 2 (end of the first sequence), 4, 5 (end)
    assert alm.begins_after(begins, chunks, 4, sequence).tolist() == [-3.0, 0.0, -6.0, 0.0]
    one = torch.zeros(1, dtype=torch.long)
    assert alm.begins_after(begins[:1], one, 1, one).tolist() == [0.0]


def test_chunks_are_joined_until_a_new_word_is_likely():
    begins = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.25, 1.0]).log()
    merged, last = alm.merge(begins, 0.5)  # 0.5 itself is not above
    assert merged.tolist() == [0, 0, 0, 1, 2, 2]
    assert last.tolist() == [False, False, True, True, False, True]
    merged, last = alm.merge(begins, 0.0)
    assert merged.tolist() == list(range(6))
    assert last.all()
