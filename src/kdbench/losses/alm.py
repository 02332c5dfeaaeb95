"""Approximate likelihood matching: probabilities of chunks of text (Minixhofer et al. 2025, arXiv 2503.20083).

Everything is in logarithms and keeps its relative precision where a probability is almost 1: there log p is almost 0, and the divergences
below compare 1 - p with 1 - q.
"""

import math

import torch
from torch import Tensor

from kdbench.losses import chunks as of_chunks


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] per row, precise relative to its own size: -log(1 + Σ_(v ≠ target) exp(z_v - z_target)).

    A logit of -inf is a token of probability 0; NaN and +inf become NaN.

    Args:
        logits: (r, V).
        targets: (r,) int64.

    Returns:
        (r,) nats, at most 0.
    """
    others = logits.scatter(-1, targets[:, None], _log_zero(logits)).logsumexp(-1)
    return _log_share(logits.gather(-1, targets[:, None]).squeeze(-1), others)


def log_probability_of_any(logits: Tensor, tokens: Tensor) -> Tensor:
    """log of the probability that the next token is one of some tokens, as precise.

    Args:
        logits: (r, V).
        tokens: (V,) bool, which.

    Returns:
        (r,) nats, at most 0.
    """
    inside, outside = (logits.masked_fill(mask, _log_zero(logits)).logsumexp(-1) for mask in (~tokens, tokens))
    return _log_share(inside, outside)


def _log_share(inside: Tensor, outside: Tensor) -> Tensor:
    """log of a / (a + b), of log a and log b."""
    gap = (outside - inside).masked_fill(torch.maximum(inside, outside).isposinf(), math.nan)
    return -torch.logaddexp(torch.zeros_like(gap), gap)


def _log_zero(of: Tensor) -> float:
    return torch.finfo(of.dtype).min / 4


def merge(begins: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Join every chunk after which the teacher does not expect a new word to those that follow (section 3.1 of the paper: γ).

    Args:
        begins: (C,) log of the teacher's probability that what follows a chunk begins a word; 0 after the last one of a sequence, so that
            no chunk crosses sequences.
        threshold: a probability γ below 1; a chunk stands for itself where the probability after it is above.

    Returns:
        (C,) int64, the new chunk of each; (C,) bool, true for the last of each new one.
    """
    closed = begins.exp() > threshold
    return closed.cumsum(0) - closed.long(), closed


def begins_after(begins: Tensor, chunks: Tensor, number: int, sequence: Tensor) -> Tensor:
    """What the row after each chunk says of the next token; 0 where the sequence ends with the chunk.

    Args:
        begins: (n,) log of the probability that the token that a row predicts begins a word.
        chunks: (n,) int64, chunk of each row.
        number: of chunks, C.
        sequence: (n,) int64, sequence of each row.

    Returns:
        (C,) nats.
    """
    last = of_chunks.sizes(chunks, number).cumsum(0) - 1
    after = (last + 1).clamp(max=len(chunks) - 1)
    inside = (after > last) & (sequence[after] == sequence[last])
    return begins[after].masked_fill(~inside, 0.0)


def forward_kl(log_q: Tensor, log_p: Tensor, temperature: float, epsilon: float = 0.0) -> Tensor:
    """p' log(p'/q') + (1-p') log((1-p')/(1-q')), p' = p^(1/τ), q' = q^(1/τ) (the paper's objective, section 3).

    Args:
        log_q: (C,) log-probabilities of the chunks under the student.
        log_p: (C,) under the teacher.
        temperature: τ.
        epsilon: subtracted from log p' and log q'; the published code has 1e-6, which hides differences between probabilities above about
            1 - τ·1e-6. Here the smallest positive number bounds 1 - p' and 1 - q' instead.

    Returns:
        (C,) nats.
    """
    a, b = (_below_zero(of / temperature - epsilon) for of in (log_p, log_q))
    return a.exp() * (a - b) - torch.expm1(a) * (_log_complement(a) - _log_complement(b))


def reverse_kl(log_q: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """`forward_kl` with the roles of student and teacher exchanged."""
    return forward_kl(log_p, log_q, temperature)


def total_variation(log_q: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """|p^(1/τ) - q^(1/τ)|: half the sum over the two outcomes (appendix A.2)."""
    return (torch.expm1(log_p / temperature) - torch.expm1(log_q / temperature)).abs()


def forward_kl_limit(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Limit of τ · `forward_kl` as τ → ∞: log p - log q + log p · log(log q / log p) (appendix A.2)."""
    a, b = _below_zero(log_p), _below_zero(log_q)
    return (a - b) + a * ((-b).log() - (-a).log())


def total_variation_limit(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Limit of τ · `total_variation` as τ → ∞: |log p - log q| (appendix A.2)."""
    return (log_p.clamp(min=_log_zero(log_p)) - log_q.clamp(min=_log_zero(log_q))).abs()


OBJECTIVES = {function.__name__: function for function in (forward_kl, reverse_kl, total_variation)}
LIMITS = {function.__name__: function for function in (forward_kl_limit, total_variation_limit)}


def _below_zero(log_p: Tensor) -> Tensor:
    """A logarithm of a probability in the open interval (0, 1); NaN stays NaN."""
    return log_p.clamp(min=_log_zero(log_p), max=-torch.finfo(log_p.dtype).tiny)


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p), precise for all p (Mächler 2012); each branch sees only what it is precise for, or its gradient would be NaN."""
    half = -math.log(2)
    return torch.where(
        log_p > half, (-torch.expm1(log_p.clamp(min=half))).log(), torch.log1p(-log_p.clamp(max=half).exp())
    )
