"""Attention between the response rows of two models (Zhang et al. 2024, arXiv 2406.17328, section 3.3)."""

import math
from typing import Literal

import torch
from torch import Tensor

from kdbench.losses.sequences import mask, pad, unpad


def deviation(values: Tensor, counts: Tensor, over: Literal["sequence", "batch"]) -> Tensor:
    """Standard deviation (unbiased) of all numbers in the rows of a sequence, or of the whole batch.

    Args:
        values: (m, d) float; computed in float32 or wider.
        counts: (B,) int64, rows of each sequence.
        over: "sequence", or "batch": then the result depends on which sequences come together.

    Returns:
        (m, 1), for each row that of its sequence or batch.
    """
    values = _wide(values)
    if over == "batch":
        return values.std().expand(len(values), 1)
    numbers = counts * values.shape[1]
    padded = pad(values, counts)
    mean = padded.sum((1, 2)) / numbers
    squares = (padded - mean[:, None, None]).square() * mask(counts)[..., None]
    found = (squares.sum((1, 2)) / (numbers - 1)).sqrt()
    return torch.repeat_interleave(found, counts)[:, None]


def cross_attention(
    queries: Tensor,
    keys: Tensor,
    student_values: Tensor,
    teacher_values: Tensor,
    counts: tuple[Tensor, Tensor],
    chunks: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row of the student a mixture of the teacher's values, and the other way round, within a sequence:

        softmax(Q Kᵀ / √d) V_t   and   softmax(K Qᵀ / √d) V_s

    The softmax runs over the rows of the sequence. With `chunks`, it runs over those alone whose state has read no more of the response
    than the row itself: those of earlier chunks of text, and the first one of its own chunk. Computed in float32 or wider, whatever
    autocast says.

    Args:
        queries: (n, d), one for each row of the student.
        keys: (m, d), one for each row of the teacher.
        student_values: (n, a).
        teacher_values: (m, b).
        counts: rows of each sequence, (B,) int64, of the student and of the teacher.
        chunks: (n,) and (m,) int64, `Step.chunks`, or None.

    Returns:
        (n, b) and (m, a).
    """
    ours, theirs = counts
    to_student = mask(theirs)[:, None, :]
    to_teacher = mask(ours)[:, None, :]
    if chunks is not None:
        to_student = to_student & _known(*chunks, *counts)
        to_teacher = to_teacher & _known(*reversed(chunks), *reversed(counts))
    with torch.autocast(queries.device.type, enabled=False):
        scores = pad(_wide(queries), ours) @ pad(_wide(keys), theirs).mT / math.sqrt(keys.shape[1])
        teacher_mixture = _softmax(scores, to_student) @ pad(_wide(teacher_values), theirs)
        student_mixture = _softmax(scores.mT, to_teacher) @ pad(_wide(student_values), ours)
    return unpad(teacher_mixture, ours), unpad(student_mixture, theirs)


def _known(reader: Tensor, read: Tensor, reader_counts: Tensor, read_counts: Tensor) -> Tensor:
    """(B, N, M) bool, true where a state has read no more of the response than the row that looks at it."""
    first = torch.ones_like(read, dtype=torch.bool)
    first[1:] = read[1:] != read[:-1]
    own, other = pad(reader, reader_counts)[:, :, None], pad(read, read_counts)[:, None, :]
    return (other < own) | ((other == own) & pad(first, read_counts)[:, None, :])


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    # Not -inf: a row of padding may see nothing, and its gradient has to stay finite.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
