"""Universal logit distillation: distributions of different vocabularies, compared by rank (Boizard et al. 2024, arXiv 2402.12030)."""

import torch.nn.functional as F
from torch import Tensor


def sorted_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ_k |q_(k) - p_(k)|: both distributions sorted downwards, the shorter one continued with zeros.

    It is the Wasserstein distance under a cost of 1 between any two tokens, with the tokens matched by rank.

    Args:
        student_logits: (r, V_s).
        teacher_logits: (r, V_t).

    Returns:
        (r,), between 0 and 2.
    """
    return sorted_difference(F.softmax(student_logits, dim=-1), F.softmax(teacher_logits, dim=-1))


def sorted_difference(q: Tensor, p: Tensor) -> Tensor:
    """Σ_k |q_(k) - p_(k)| of two positive measures: (r, V_s) and (r, V_t) -> (r,)."""
    q, p = (measure.sort(dim=-1, descending=True).values for measure in (q, p))
    longest = max(q.shape[-1], p.shape[-1])
    q, p = F.pad(q, (0, longest - q.shape[-1])), F.pad(p, (0, longest - p.shape[-1]))
    return (q - p).abs().sum(-1)
