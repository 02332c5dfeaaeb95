"""Sums and means over chunks of text, which student and teacher split into different numbers of tokens."""

import torch
from torch import Tensor


def count(chunks: Tensor) -> int:
    """How many chunks there are; `chunks` (n,) int64 is ascending and counts from 0."""
    return int(chunks[-1]) + 1 if len(chunks) else 0


def sums(values: Tensor, chunks: Tensor, number: int) -> Tensor:
    """(n,) values of rows, of which each belongs to a chunk, -> (number,) sums over the rows of each chunk; differentiable."""
    return values.new_zeros(number).index_add(0, chunks, values)


def sizes(chunks: Tensor, number: int) -> Tensor:
    """(number,) int64, rows of each chunk."""
    return sums(torch.ones_like(chunks), chunks, number)


def owners(chunks: Tensor, sequence: Tensor, number: int) -> Tensor:
    """(number,) int64, the sequence that each chunk belongs to; `sequence` (n,) is that of each row."""
    return sequence.new_zeros(number).scatter(0, chunks, sequence)


def mean_weights(owner: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that turn a sum over chunks into Σ over sequences of (rows of the sequence · mean over its chunks).

    Args:
        owner: (C,) int64, sequence of each chunk.
        counts: (B,) int64, rows of each sequence.
        dtype: of the weights.

    Returns:
        (C,).
    """
    chunks = sizes(owner, len(counts))
    return (counts.to(dtype) / chunks.clamp(min=1))[owner]


def alone(ours: Tensor, theirs: Tensor) -> Tensor:
    """(n,) bool, rows of one side whose chunk is one row on either side: the same token text on both.

    Args:
        ours: (n,) int64, chunk of each row.
        theirs: (m,) int64, of the other side; the same chunks.
    """
    number = count(ours)
    return ((sizes(ours, number) == 1) & (sizes(theirs, number) == 1))[ours]
