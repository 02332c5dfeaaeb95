"""General online logit distillation: ULD on chunks of text, token by token where the vocabularies share one.

The loss of `trl.experimental.gold` (huggingface/trl, class ULDLoss with uld_use_hybrid_loss). A chunk that is one token on one side may be
several on the other; its distribution is that of one of its rows, times the probabilities of the tokens at its other rows. That is a
measure, not a distribution: its sum is the product.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses import chunks as of_chunks
from kdbench.losses.divergences import generalized_jsd
from kdbench.losses.uld import sorted_difference
from kdbench.signals import Rows


@dataclass(frozen=True)
class Group:
    """The rows of one side that take part, chunk by chunk.

    Attributes:
        base: (C,) int64, the row of each chunk whose whole distribution is compared.
        others: (k,) int64, the remaining rows, of which only one probability is taken.
        tokens: (k,) int64, the token whose probability that is.
        chunks: (k,) int64, the chunk that each belongs to.
    """

    base: Tensor
    others: Tensor
    tokens: Tensor
    chunks: Tensor


def groups(
    student: Rows, teacher: Rows, chunks: tuple[Tensor, Tensor], merge: str, rows: str, skip_last: bool
) -> tuple[Group, Group]:
    """The rows that are compared: of both sides, with the chunks counted anew from 0 where some are left out.

    Args:
        student: the student's rows, n.
        teacher: the teacher's rows, m.
        chunks: (n,) and (m,) int64, the chunk that each row's target belongs to.
        merge: "observed": the whole distribution is that of a chunk's first row; "bayesian": of its last.
        rows: "target": a chunk has the rows that predict its tokens, each with the probability of its target. "input": the rows that have
            just read them, each with the probability of reading the same token once more; the end of text, after which there is no row,
            then has no chunk.
        skip_last: leave the last chunk of every sequence, the end of text, out.
    """
    sides = [
        _targets(side, of, skip_last) if rows == "target" else _inputs(side, of)
        for side, of in zip((student, teacher), chunks, strict=True)
    ]
    number = of_chunks.count(chunks[0])
    present = [of_chunks.sizes(where[where >= 0], number) > 0 for where, _ in sides]
    common = present[0] & present[1]
    again = torch.where(common, common.cumsum(0) - 1, -1)
    found = []
    for where, tokens in sides:
        chunk = torch.where(where >= 0, again[where.clamp(min=0)], -1)
        taken = (chunk >= 0).nonzero().squeeze(1)
        chunk = chunk[taken]
        changes = chunk[1:] != chunk[:-1]
        edge = changes.new_ones(min(1, len(chunk)))
        is_base = torch.cat([edge, changes] if merge == "observed" else [changes, edge])
        others = taken[~is_base]
        found.append(Group(taken[is_base], others, tokens[others], chunk[~is_base]))
    return found[0], found[1]


def _targets(side: Rows, chunks: Tensor, skip_last: bool) -> tuple[Tensor, Tensor]:
    """For each row its chunk (-1 for none) and the token it stands for."""
    if skip_last:
        last = chunks[side.counts.cumsum(0) - 1]
        chunks = chunks.masked_fill(chunks == last[side.sequence], -1)
    return chunks, side.targets


def _inputs(side: Rows, chunks: Tensor) -> tuple[Tensor, Tensor]:
    first = side.counts.cumsum(0) - side.counts
    return chunks.roll(1).index_fill(0, first, -1), side.inputs


def hybrid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    log_factors: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    rest: tuple[Tensor, Tensor],
    beta: float,
) -> dict[str, Tensor]:
    """A generalised Jensen-Shannon divergence over the tokens of both vocabularies, sorted L1 over the others.

    Args:
        student_logits: (r, V_s), already divided by its temperature.
        teacher_logits: (r, V_t), likewise.
        log_factors: (r,) and (r,), log of what the two distributions are multiplied by.
        shared: (k,) and (k,) int64, ids of the tokens of both vocabularies.
        rest: ids of the student's other tokens and of the teacher's.
        beta: of `generalized_jsd`.

    Returns:
        "matched" (r,) nats and "unmatched" (r,).
    """
    log_q, log_p = (
        F.log_softmax(logits, dim=-1) + factor[:, None]
        for logits, factor in zip((student_logits, teacher_logits), log_factors, strict=True)
    )
    return {
        "matched": generalized_jsd(log_q[:, shared[0]], log_p[:, shared[1]], beta),
        "unmatched": sorted_difference(log_q[:, rest[0]].exp(), log_p[:, rest[1]].exp()),
    }
