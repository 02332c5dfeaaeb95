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


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence of each row, and its place in it."""
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = counts.cumsum(0) - counts
    return sequence, torch.arange(len(sequence), device=counts.device) - starts[sequence]
