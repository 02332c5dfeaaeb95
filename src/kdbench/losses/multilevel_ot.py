"""Multi-level optimal transport: distributions of different vocabularies, compared by rank and by position (arXiv 2412.14528).

Student and teacher are each reduced to the k tokens that rank highest over a whole response (`top_tokens`); the r-th of one is compared
with the r-th of the other, at paired positions (`absolute_difference`, `log_loss`) and between all positions (`transport_cost`, for
`kdbench.losses.ot.sinkhorn`). Probabilities are those of a softmax over the whole vocabulary, cut to the k tokens.
"""

import torch
from torch import Tensor

from kdbench.losses.sequences import pad


def sequence_means(values: Tensor, counts: Tensor) -> Tensor:
    """Means over the rows of each sequence: (n, ...) and (B,) -> (B, ...), in float32 or wider.

    Logits are linear in hidden states: the mean state of a response, put through the head, is the mean of its logits, which ranks the
    vocabulary as their sum does.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return pad(wide, counts).sum(1) / counts.view(-1, *[1] * (values.dim() - 1))


def top_tokens(scores: Tensor, k: int) -> Tensor:
    """The k tokens of each sequence that score highest, the best one first: (B, V) -> (B, k) int64."""
    return scores.topk(k, dim=-1).indices


def log_probabilities_of(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) over the whole vocabulary, of some tokens.

    Args:
        logits: (r, V).
        tokens: (r, k) int64.
        temperature: T.

    Returns:
        (r, k) nats.
    """
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.gather(-1, tokens) - scaled.logsumexp(-1, keepdim=True)


def by_deviation(logits: Tensor, constant: float = 1e-4) -> Tensor:
    """Logits divided by their standard deviation over the vocabulary plus a constant, as both published codes do (the paper does not)."""
    return logits / (logits.std(-1, keepdim=True) + constant)


def absolute_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """L_HAD: Σ_r |t_r - s_r|, of probabilities (..., k) and (..., k) -> (...), between 0 and 2 (holistic absolute difference)."""
    return (teacher - student).abs().sum(-1)


def log_loss(log_student: Tensor, teacher: Tensor) -> Tensor:
    """L_SL: -Σ_r t_r log s_r, of log-probabilities and probabilities (..., k) and (..., k) -> (...) nats (sequential logarithmic loss)."""
    return -(teacher * log_student).sum(-1)


def transport_cost(student: Tensor, teacher: Tensor) -> Tensor:
    """C_ij = Σ_r |s_ir - t_jr|: (B, N, k) and (B, M, k) -> (B, N, M), between 0 and 2."""
    return torch.cdist(student, teacher, p=1)


def matched_columns(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's probabilities, with columns matched to the teacher's one after the other instead of by rank.

    The teacher's first column takes the student's column that is nearest in L1 distance over all positions, the next one the nearest
    of those left. Published as an alternative (`f = 2` in the authors' repository), where the numbers of positions are read as numbers of
    columns; here every column of the teacher gets one.

    Args:
        student: (B, N, K_s), K_s at least K_t.
        teacher: (B, N, K_t), of the same positions.

    Returns:
        (B, N, K_t).
    """
    with torch.no_grad():
        distances = torch.cdist(teacher.mT, student.mT, p=1)
        columns = []
        for column in range(teacher.shape[2]):
            nearest = distances[:, column].argmin(-1)[:, None]
            distances = distances.scatter(2, nearest[:, :, None].expand(-1, teacher.shape[2], 1), torch.inf)
            columns.append(nearest)
    return student.gather(2, torch.cat(columns, dim=1)[:, None, :].expand(-1, student.shape[1], -1))
