"""Divergences between the next-token distributions of a teacher, p, and a student, q, of one vocabulary.

All are plain functions of logits, (r, V) and (r, V) -> (r,) nats, and work in log space. The temperature divides both logits; there is
no factor T² (the published code has none). A logit of -inf is a token of probability 0. Where KL would be infinite because of one, the
token is left out of the sum, as the published code does; the mixtures are finite there and leave nothing out. NaN and +inf become NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax with a finite number for log 0, so that 0 · log 0 and its gradient are 0; NaN stays NaN."""
    return _LogSoftmax.apply(logits, temperature)


def _log_zero(of: Tensor) -> float:
    return torch.finfo(of.dtype).min / 4


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) per row, without the tokens of q = 0."""
    return _Kl.apply(log_p, log_q)


# The functions below are what autograd would do of itself, in half as many passes over vocabulary-wide tensors: these passes, not the
# products, would be most of a loss.


def _zeros(finite_logs: Tensor) -> Tensor | None:
    """Which probabilities are 0, from logarithms with a finite number for log 0; None if there are none, where finding out is cheap."""
    zero = _log_zero(finite_logs)
    if finite_logs.device.type == "cpu" and not (finite_logs.amin(-1) <= zero).any():
        return None
    return finite_logs <= zero


class _LogSoftmax(torch.autograd.Function):
    """The gradient of a token of probability 0 is 0 whatever comes back to it, so the floor has no part in the backward pass."""

    @staticmethod
    def forward(ctx, logits, temperature):
        scaled = logits if temperature == 1 else logits / temperature
        found = F.log_softmax(scaled, dim=-1).clamp_(min=_log_zero(logits))
        ctx.temperature = temperature
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (found,) = ctx.saved_tensors
        gradient = torch.ops.aten._log_softmax_backward_data(upstream, found, -1, found.dtype)
        return gradient if ctx.temperature == 1 else gradient.div_(ctx.temperature), None


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_p, log_q):
        p, ratio, absent = log_p.exp(), log_p - log_q, _zeros(log_q)
        if absent is not None:
            p.masked_fill_(absent, 0.0)
        ctx.save_for_backward(p, ratio if ctx.needs_input_grad[0] else None)
        return torch.linalg.vecdot(p, ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        p, ratio = ctx.saved_tensors
        to_p = None if ratio is None else (ratio + 1).mul_(p).mul_(upstream[..., None])
        return to_p, p * -upstream[..., None] if ctx.needs_input_grad[1] else None


class _KlOfLogits(torch.autograd.Function):
    """KL(softmax(a / T) ‖ softmax(b / T)) per row, without the tokens of probability 0 on the right.

    With the two normalisers as numbers per row, no logarithm of a probability is ever made for the whole vocabulary.
    """

    @staticmethod
    def forward(ctx, a, b, temperature):
        (p, a, log_sum_a), (q, b, log_sum_b) = (_KlOfLogits._normalise(logits, temperature) for logits in (a, b))
        absent = _zeros(b)
        difference = a.sub_(b)
        kept = p if absent is None else p.masked_fill(absent, 0.0)
        mass = None if absent is None else kept.sum(-1)
        offset = log_sum_b - log_sum_a
        if ctx.needs_input_grad[0]:
            value = torch.linalg.vecdot(kept, difference)
        else:
            value, difference = difference.mul_(kept).sum(-1), None
        value = value + (offset if absent is None else offset * mass)
        ctx.temperature = temperature
        ctx.save_for_backward(p, kept, q if ctx.needs_input_grad[1] else None, difference, mass, offset, value)
        return value

    @staticmethod
    def _normalise(logits, temperature):
        """Softmax, logits with a finite number for -inf, both new tensors, and the logarithm of the sum of their exponentials."""
        scaled = logits / temperature
        probabilities = scaled.softmax(-1)
        log_sum = scaled.amax(-1) - probabilities.amax(-1).log()
        return probabilities, scaled.clamp_(min=_log_zero(scaled)), log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        p, kept, q, difference, mass, offset, value = ctx.saved_tensors
        scale = (upstream / ctx.temperature)[..., None]
        to_a = to_b = None
        if ctx.needs_input_grad[0]:
            # Σ over kept tokens of p (log p - log q): its slope in log p is `slope`, whose mean over p the softmax takes away.
            slope = (difference + (offset + 1)[..., None]).mul_(kept)
            mean = value + (1 if mass is None else mass)
            to_a = slope.sub_(p * mean[..., None]).mul_(scale)
        if ctx.needs_input_grad[1]:
            to_b = (q - kept if mass is None else q * mass[..., None] - kept).mul_(scale)
        return to_a, to_b, None


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share · a + (1 - share) · b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) = Σ p (log p - log q) (Hinton et al. 2015, arXiv 1503.02531, with the teacher's entropy)."""
    return _KlOfLogits.apply(teacher_logits, student_logits, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q ‖ p) = Σ q (log q - log p), over the whole vocabulary (the objective of MiniLLM, Gu et al. 2023, arXiv 2306.08543)."""
    return _KlOfLogits.apply(student_logits, teacher_logits, temperature)


def js_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2 (Lin 1991)."""
    log_p, log_q = _log_probabilities(teacher_logits, temperature), _log_probabilities(student_logits, temperature)
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def skewed_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew_lambda: float = 0.1
) -> Tensor:
    """KL(p ‖ λp + (1-λ)q), 0 < λ < 1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    log_p, log_q = _log_probabilities(teacher_logits, temperature), _log_probabilities(student_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, skew_lambda))


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew_lambda: float = 0.1
) -> Tensor:
    """KL(q ‖ (1-λ)p + λq), 0 < λ < 1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    log_p, log_q = _log_probabilities(teacher_logits, temperature), _log_probabilities(student_logits, temperature)
    return _kl(log_q, _log_mixture(log_q, log_p, skew_lambda))


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, adaptive_alpha: float = 0.5
) -> Tensor:
    """w KL(p ‖ q) + (1-w) KL(q ‖ p), w = g_head / (g_head + g_tail) (Wu et al. 2024, arXiv 2404.02657).

    The teacher's least likely tokens, up to a cumulative probability of `adaptive_alpha`, are the tail, the others the head; g is
    Σ |p - q| over either. No gradient flows through w. At p = q, where w is 0/0, the divergence and its gradient are 0.
    """
    log_p, log_q = _log_probabilities(teacher_logits, temperature), _log_probabilities(student_logits, temperature)
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, stable=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        tail = p.cumsum(-1) <= adaptive_alpha
        weight = gap.masked_fill(tail, 0.0).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """½ Σ |p - q|, between 0 and 1 (f-distill, Wen et al. 2023, arXiv 2307.15190)."""
    p, q = F.softmax(teacher_logits / temperature, dim=-1), F.softmax(student_logits / temperature, dim=-1)
    return 0.5 * (p - q).abs().sum(-1)


def generalized_jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1-β) KL(q ‖ m), m = βp + (1-β)q; at β = 0 it is KL(p ‖ q), at β = 1 KL(q ‖ p) (Agarwal et al. 2023, arXiv 2306.13649).

    Of positive measures, which need not sum to 1: then the sums Σ p (log p - log m) stand for the KLs. For 0 < β < 1 the divergence is
    never negative and 0 at p = q alone; at the two ends that holds of probabilities only.

    Args:
        log_q: (r, k) logarithms of the student's measure.
        log_p: (r, k) of the teacher's.
        beta: between 0 and 1.

    Returns:
        (r,) nats.
    """
    log_q, log_p = (measure.clamp(min=_log_zero(measure)) for measure in (log_q, log_p))
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def entropy(logits: Tensor) -> Tensor:
    """-Σ p log p of softmax(logits): (r, V) -> (r,) nats. A diagnostic: without gradient."""
    logits = logits.detach()
    p, largest = logits.softmax(-1), logits.amax(-1, keepdim=True)
    below = (logits - largest).clamp_(min=_log_zero(logits))
    return -(p.amax(-1).log() + below.mul_(p).sum(-1))


OBJECTIVES = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        js_divergence,
        skewed_forward_kl,
        skewed_reverse_kl,
        adaptive_kl,
        total_variation,
    )
}

# Which objective reads which option besides the temperature.
OPTIONS = {
    "skewed_forward_kl": ("skew_lambda",),
    "skewed_reverse_kl": ("skew_lambda",),
    "adaptive_kl": ("adaptive_alpha",),
}
