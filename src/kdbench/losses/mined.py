"""A teacher's logits in the student's vocabulary, by a map of the tokens (FuseLLM, Wan et al. 2024, arXiv 2401.10491, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses.cross_entropy import cross_entropy


def largest_of_preimage(logits: Tensor, nearest: Tensor, size: int) -> Tensor:
    """For each token of the student, the largest logit among the teacher's tokens that are mapped to it; without gradient.

    FuseLLM's own code comes to the same: it reads the teacher's logits downwards and keeps the first that falls on a token.

    Args:
        logits: (r, V_t).
        nearest: (V_t,) int64, the student's token for each of the teacher's, below `size`.
        size: tokens of the student, V_s.

    Returns:
        (r, V_s); -inf, a probability of 0, where no token is mapped to. NaN stays NaN.
    """
    moved = logits.new_full((len(logits), size), -torch.inf)
    return moved.scatter_reduce(1, nearest.expand(len(logits), -1), logits.detach(), "amax")


def first_preimage(nearest: Tensor, size: int) -> Tensor:
    """For each token of the student, the lowest id among the teacher's tokens that are mapped to it: the only one of them that the port
    in DSKD looks at (`max_align_num = 1`).

    Args:
        nearest: (V_t,) int64, the student's token for each of the teacher's, below `size`.
        size: tokens of the student, V_s.

    Returns:
        (V_s,) int64; V_t where no token is mapped to.
    """
    ids = torch.arange(len(nearest), device=nearest.device)
    return ids.new_full((size,), len(nearest)).scatter_reduce(0, nearest, ids, "amin")


def first_of_preimage(logits: Tensor, first: Tensor) -> Tensor:
    """For each token of the student, the logit of one token of the teacher; without gradient.

    Args:
        logits: (r, V_t).
        first: (V_s,) int64, see `first_preimage`.

    Returns:
        (r, V_s); -inf where there is no such token.
    """
    return F.pad(logits.detach(), (0, 1), value=-torch.inf)[:, first]


def one_hot_divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(one-hot ‖ q) = -log q[target], q = softmax(logits / T).

    The published code makes the one-hot distribution of logits 100 and -100,000, which is this up to round-off.

    Args:
        logits: (r, V).
        targets: (r,) int64.
        temperature: T.

    Returns:
        (r,) nats.
    """
    return cross_entropy(logits / temperature, targets)
