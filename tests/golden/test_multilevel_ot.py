"""multilevel_ot against both published codes, which are compositions of the same functions in another order.

`as_published_code` is the port in MCW-KD, `original_repository` the authors' code. Both divide logits by their deviation, rank by
probabilities over the whole batch, put probabilities through a second softmax, and let padding into the plan. Ours does none of this
(docs/methods.md); the last tests show what each does to the numbers.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.losses.multilevel_ot import (
    absolute_difference,
    by_deviation,
    log_loss,
    matched_columns,
    top_tokens,
    transport_cost,
)
from kdbench.losses.ot import PUBLISHED_SEQUENCE, sinkhorn
from kdbench.methods.multilevel_ot import MultilevelOt
from kdbench.signals import Step
from tests.golden import golden


def _of(variant):
    """The cases that have numbers of this variant."""
    found = golden.parameters("multi_level_ot")
    found = [of for of in found if of.values[0] is None or variant in of.values[0]["expected"]]
    return pytest.mark.parametrize(("case", "inputs", "precision"), found)


SCALE = 0.001  # of the published Sinkhorn distance of a sequence
SHARE = 0.1  # of the published logarithmic loss and Sinkhorn distance
PUBLISHED_TEMPERATURE = 2.0  # of the second softmax before the Sinkhorn distance


def _ranked(probabilities, k):
    """The k tokens of the largest sums over the whole batch."""
    (tokens,) = top_tokens(probabilities.sum((0, 1))[None], min(k, probabilities.shape[-1]))
    return probabilities[..., tokens]


def _of_one_size(q, p):
    k = max(q.shape[-1], p.shape[-1])
    return F.pad(q, (0, k - q.shape[-1])), F.pad(p, (0, k - p.shape[-1]))


def _log_losses(q, p):
    """Of probabilities that are put through another softmax, (B, T)."""
    return log_loss(q.log_softmax(-1), p.softmax(-1))


def _sinkhorn_distances(q, p, **settings):
    """Of probabilities that are put through another softmax, over all positions, (B,)."""
    cost = transport_cost(*((of / PUBLISHED_TEMPERATURE).softmax(-1) for of in (q, p)))
    everything = torch.full((len(cost),), cost.shape[1])
    return sinkhorn(cost, everything, everything, **(PUBLISHED_SEQUENCE | settings)).value


def _rolled(values, valid):
    """Positions turned round so that the response stands first."""
    starts = valid.int().argmax(1).tolist()
    return torch.stack([row.roll(-start, 0) for row, start in zip(values, starts, strict=True)])


def _port(case, z_s, z_t, valid_s, valid_t):
    """The distillation loss of the port in MCW-KD: a mean over all positions, as often as there are positions valid in both."""
    params = case["params"]
    temperatures = params["student_temperature"], params["teacher_temperature_mlot"]
    q, p = (
        (by_deviation(_rolled(z, valid)) / temperature).softmax(-1)
        for z, valid, temperature in zip((z_s, z_t), (valid_s, valid_t), temperatures, strict=True)
    )
    q, p = _of_one_size(_ranked(q, params["top_k"]), _ranked(p, params["top_k"]))
    scalar = absolute_difference(q, p).mean() + SHARE * _log_losses(q, p).mean()
    scalar = scalar + SHARE * SCALE * _sinkhorn_distances(q, p).sum()
    return scalar * (_rolled(valid_s, valid_s) & _rolled(valid_t, valid_t)).sum()


def _original(case, z_s, z_t, valid_s, valid_t):
    """The distillation loss of the authors' code: responses alone, padded with rows of zeros; student and teacher change places."""
    params = case["params"]
    sizes_s, sizes_t = valid_s.sum(1), valid_t.sum(1)
    longest = int(max(sizes_s.max(), sizes_t.max()))

    def responses(z, valid, temperature):
        probabilities = (by_deviation(z) / temperature).softmax(-1) * valid[..., None]
        return _rolled(probabilities, valid)[:, :longest]

    q = responses(z_s, valid_s, params["student_temperature"])
    p = _ranked(responses(z_t, valid_t, params["teacher_temperature_mlot"]), params["top_k"])
    if params["f"] == 1:
        q = _ranked(q, params["top_k"])
    else:  # the number of positions is taken for the number of columns on either side
        matched = matched_columns(q[:, :, :longest], p[:, :, :longest])
        q = F.pad(matched, (0, p.shape[-1] - matched.shape[-1]))
    q, p = _of_one_size(q, p)
    both = torch.arange(longest) < torch.minimum(sizes_s, sizes_t)[:, None]
    had = (absolute_difference(q, p) * both).sum(1) / both.sum(1)
    return had.mean() + SHARE * _log_losses(p, q).mean() + SHARE * SCALE * _sinkhorn_distances(p, q).sum()


def _given(inputs, precision):
    """Logits, the student's with gradient, and where they are of a response."""
    logits = golden.leaf(inputs["student_logits"], precision), golden.leaf(inputs["teacher_logits"], precision).detach()
    valid = [torch.tensor(inputs[name]) != golden.IGNORED for name in ("label", "teacher_label")]
    return logits, valid


@_of("as_published_code")
def test_the_port(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    rate = case["params"]["kd_rate"]
    (z_s, z_t), valid = _given(inputs, precision)
    reference = cross_entropy(z_s[valid[0]], torch.tensor(inputs["label"]).long()[valid[0]]).sum()
    distillation = _port(case, z_s, z_t, *valid)
    assert set(want["components"]) == {"nll_loss", "loss", "accuracy", "kd_loss_derived"}
    golden.assert_loss(reference, want["components"]["nll_loss"], precision)
    golden.assert_loss(distillation, want["components"]["kd_loss_derived"], precision)
    golden.assert_loss(reference + rate * distillation, want["loss"], precision)
    of_reference, of_distillation = (torch.autograd.grad(loss, z_s)[0] for loss in (reference, rate * distillation))
    golden.assert_gradient(of_reference + of_distillation, want["grads"]["student_logits"], precision)
    golden.assert_gradient(of_reference, want["component_grads"]["nll_loss"]["student_logits"], precision)
    golden.assert_gradient(of_distillation, want["component_grads"]["loss_minus_nll"]["student_logits"], precision)
    # The published accuracy compares logits with labels that were turned round since.
    turned = _rolled(torch.tensor(inputs["label"]).long(), valid[0])
    assert correct(z_s[turned >= 0], turned[turned >= 0]).sum().item() == want["components"]["accuracy"]


@_of("original_repository")
def test_the_authors_code(case, inputs, precision):
    want = case["expected"]["original_repository"]["f64"]
    (z_s, z_t), valid = _given(inputs, precision)
    loss = _original(case, z_s, z_t, *valid)
    golden.assert_loss(loss, want["loss"], precision)
    golden.assert_loss(loss, want["components"]["distillation_loss"], precision)
    golden.assert_gradient(torch.autograd.grad(loss, z_s)[0], want["grads"]["student_logits"], precision)


# What each published habit does, on one sequence of n positions without padding, the same number on either side.

N, STUDENT, TEACHER = 6, 60, 75
CASE = {"params": {"student_temperature": 2.0, "teacher_temperature_mlot": 2.0, "top_k": 50, "f": 1}}


def _sequence(seed=0):
    """Logits (1, n, V) in which some tokens are likely everywhere, so that summed logits and probabilities rank alike."""
    generator = torch.Generator().manual_seed(seed)
    return [
        4 * torch.linspace(3, 0, size)[torch.randperm(size, generator=generator)].double()
        + 0.01 * torch.randn(1, N, size, generator=generator, dtype=torch.float64)
        for size in (STUDENT, TEACHER)
    ]


def _ours(z_s, z_t, **settings):
    labels = torch.zeros(z_s.shape[:2])
    signals = [golden.of_logits(labels.numpy(), z) for z in (z_s, z_t)]
    pairs = torch.arange(labels.numel())[:, None].expand(-1, 2)
    settings = {"normalize_logits": True, "token_temperature": 2.0, "sinkhorn_iterations": 10} | settings
    return MultilevelOt(MultilevelOt.Settings(**settings), None, None)(*signals, Step(pairs=pairs)).sums


def _published(z_s, z_t):
    """The probabilities that the published losses compare, (1, n, 50) each."""
    return [_ranked((by_deviation(z) / 2.0).softmax(-1), 50) for z in (z_s, z_t)]


def test_the_absolute_difference_is_the_published_one_where_tokens_rank_alike():
    z_s, z_t = _sequence()
    torch.testing.assert_close(
        _ours(z_s, z_t)["had"], N * absolute_difference(*_published(z_s, z_t)).mean(), rtol=1e-12, atol=0
    )


def test_a_second_softmax_leaves_little_of_the_logarithmic_loss():
    """Of probabilities, which are between 0 and 1, it is within 1 of log k, and so is its loss; its gradient is at most (e - 1) / k."""
    z_s, z_t = _sequence()
    q, p = _published(z_s, z_t)
    torch.testing.assert_close(_ours(z_s, z_t)["sl"], log_loss(q.log(), p).sum(), rtol=1e-12, atol=0)
    q.requires_grad_()
    twice = _log_losses(q, p)
    (gradient,) = torch.autograd.grad(twice.sum(), q)
    assert ((twice - math.log(50)).abs() < 1).all()
    assert gradient.abs().max() <= (math.e - 1) / 50
    (once,) = torch.autograd.grad(log_loss(q.log(), p).sum(), q)
    assert once.abs().max() > 10 * gradient.abs().max()


def test_the_sinkhorn_distance_is_the_published_one_without_its_second_softmax():
    """The published plan has a mass of n, as ours times n has; only a thousandth of it counts."""
    z_s, z_t = _sequence()
    once = transport_cost(*_published(z_s, z_t))
    of_sequence = sinkhorn(once, *torch.tensor([[N], [N]]), **PUBLISHED_SEQUENCE).value.sum()
    torch.testing.assert_close(_ours(z_s, z_t)["sd"], of_sequence, rtol=1e-12, atol=0)
    q, p = _published(z_s, z_t)
    assert _sinkhorn_distances(q, p).sum() < of_sequence / 10


def test_a_sum_over_sequences_times_the_positions_counts_sequences_twice():
    """Two copies of a sequence have twice the loss with ours; of the port's, the Sinkhorn distance is four times that of one."""
    z_s, z_t = _sequence()
    valid = torch.ones(1, N, dtype=torch.bool)
    copies = [torch.cat([of, of]) for of in (z_s, z_t, valid, valid)]
    one, two = _port(CASE, z_s, z_t, valid, valid), _port(CASE, *copies)
    surplus = 2 * N * SHARE * SCALE * _sinkhorn_distances(*_published(z_s, z_t)).sum()
    torch.testing.assert_close(two - 2 * one, surplus, rtol=1e-9, atol=0)
    for name, value in _ours(*copies[:2]).items():
        torch.testing.assert_close(value, 2 * _ours(z_s, z_t)[name], rtol=1e-12, atol=0)


def test_ranking_over_a_batch_keeps_tokens_that_a_sequence_does_not_have():
    """Two sequences, each sure of one token: of k = 1 the batch keeps the surer one's, and has almost nothing of the other's."""
    logits = torch.zeros(2, N, STUDENT, dtype=torch.float64)
    logits[0, :, 5], logits[1, :, 9] = 12.0, 11.0
    probabilities = logits.softmax(-1)
    batch = _ranked(probabilities, 1)[..., 0]
    assert (batch[0] > 0.99).all()
    assert (batch[1] < 1e-4).all()
    assert top_tokens(logits.sum(1), 1).tolist() == [[5], [9]]
    settings = {"top_k": 1, "normalize_logits": False, "token_temperature": 1.0}
    assert _ours(logits, logits, **settings)["had"] == 0
    torch.testing.assert_close(
        _ours(logits, logits.flip(0), **settings)["had"], 2 * N * (probabilities[0, 0, 5] - probabilities[1, 0, 9])
    )


def test_positions_that_are_none_of_the_response_change_the_port_alone():
    """Padding with probabilities that are equal on both sides adds 0 to the sum of differences and thins out its mean."""
    z_s = _sequence()[0]
    z_t = z_s + 0.5 * torch.randn(1, N, STUDENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padding = z_s.mean(1, keepdim=True).expand(-1, N, -1)
    padded = [torch.cat([z, padding], 1) for z in (z_s, z_t)]
    valid = torch.arange(2 * N)[None] < N
    bare, filled = _port(CASE, z_s, z_t, valid[:, :N], valid[:, :N]), _port(CASE, *padded, valid, valid)
    difference = absolute_difference(*_published(*padded)).sum(1)[0] / (2 * N)
    others = SHARE * _log_losses(*_published(*padded)).mean()
    others = others + SHARE * SCALE * _sinkhorn_distances(*_published(*padded)).sum()
    torch.testing.assert_close(filled, N * (difference + others), rtol=1e-12, atol=0)
    assert filled < bare
