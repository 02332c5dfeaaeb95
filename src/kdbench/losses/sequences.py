"""From the flat rows of a batch to padded sequences, for losses that compare whole sequences."""

import torch
from torch import Tensor


def pad(values: Tensor, counts: Tensor) -> Tensor:
    """Rows as sequences, padded with zeros; differentiable.

    Args:
        values: (n, ...), the rows of a batch, sequence after sequence.
        counts: (B,) int64, rows of each sequence; sums to n.

    Returns:
        (B, N, ...), N the longest sequence.
    """
    padded = values.new_zeros(len(counts), int(counts.max()), *values.shape[1:])
    return padded.index_put(_places(counts), values)


def unpad(padded: Tensor, counts: Tensor) -> Tensor:
    """The rows of padded sequences: the inverse of `pad`, (B, N, ...) -> (n, ...)."""
    return padded[_places(counts)]


def mask(counts: Tensor, longest: int | None = None) -> Tensor:
    """(B, N) bool, true on rows and false on padding; N is the longest sequence unless it is given."""
    longest = int(counts.max()) if longest is None else longest
    return torch.arange(longest, device=counts.device) < counts[:, None]


def partners(pairs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The row of the teacher for each row of the student.

    Args:
        pairs: (p, 2) int64, rows of the student, none twice, and of the teacher.
        rows: n, how many rows the student has.

    Returns:
        (n,) int64, 0 where there is none, and (n,) bool, whether there is one.
    """
    found = pairs.new_full((rows,), -1).index_put((pairs[:, 0],), pairs[:, 1])
    return found.clamp(min=0), found >= 0


def mean_over(chosen: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that turn a sum over chosen rows into Σ over sequences of (rows of the sequence · mean over its chosen rows).

    Args:
        chosen: (n,) bool.
        counts: (B,) int64, rows of each sequence.
        dtype: of the weights.

    Returns:
        (n,), 0 on rows that are not chosen.
    """
    number = pad(chosen, counts).sum(1)
    return torch.repeat_interleave(counts.to(dtype) / number.clamp(min=1), counts) * chosen


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence of each row, and its place in it."""
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = counts.cumsum(0) - counts
    return sequence, torch.arange(len(sequence), device=counts.device) - starts[sequence]
