"""Costs of multi-cost Wasserstein distillation between the positions of a student's and a teacher's response.

AAAI 2026, doi 10.1609/aaai.v40i39.40619. Rows i are the student's positions, columns j the teacher's: every cost is (B, N, M), beyond a
sequence's rows and columns of numbers that mean nothing (`kdbench.losses.ot` does not read them). Costs are float32 or wider.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses.sequences import mask

_CONSTANT = 1e-7  # beside norms and maxima that are divided by, as in the published code
# Squared distances below this share of the two squared norms are rounding errors of the product in float64.
_SAME = 1e-14


class Side(NamedTuple):
    """One model's positions, padded with zeros.

    Attributes:
        log_top: (B, N, k) log-probabilities over its k largest logits, downwards.
        salience: (B, N) logits.
        context: (B, N, d) window means of hidden states, the teacher's projected to the student's width.
        inputs: (B, N) int64, the token that each position has just read.
    """

    log_top: Tensor
    salience: Tensor
    context: Tensor
    inputs: Tensor


Counts = tuple[Tensor, Tensor]  # (B,) rows of one side, (B,) of the other


def logits_costs(
    one: Side, other: Side, in_largest: Counts | None = None, units: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Costs l2, kl and salience between two sides.

    Args:
        one: rows.
        other: columns.
        in_largest: counts of the two sides: every cost is divided by its largest in the sequence (published for the semi-dual).
        units: divide by these (B,) instead, such as those of other sides.

    Returns:
        The costs (B, N, M), and the units that they were divided by, if any.
    """
    costs = [
        l2_costs(one.log_top.exp(), other.log_top.exp()),
        kl_costs(one.log_top, other.log_top),
        salience_costs(one.salience, other.salience),
    ]
    if in_largest is not None and not units:
        units = [largest(cost, *in_largest) for cost in costs]
    if not units:
        return costs, []
    return [in_units_of(cost, unit) for cost, unit in zip(costs, units, strict=True)], units


def hidden_costs(
    one: Side, other: Side, lexical: Tensor | None, counts: Counts, units: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Costs lexical, context and cosine between two sides.

    Args:
        one: rows.
        other: columns.
        lexical: (B, N, M) distances of the tokens just read, or None: 0 for the same token and 1 for others, within one vocabulary.
        counts: of the two sides.
        units: divide the context cost by its first (B,) instead of by the largest in the sequence.

    Returns:
        The costs (B, N, M), and the unit of the context cost.
    """
    if lexical is None:
        lexical = one.inputs[:, :, None] != other.inputs[:, None, :]
    distance = l2_costs(one.context, other.context)
    units = units or [largest(distance, *counts)]
    cosine = cosine_costs(one.context, other.context)
    return [lexical.to(distance.dtype), in_units_of(distance, units[0]), cosine], units


def largest_logits(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, downwards: (r, V) -> (r, k)."""
    return logits.topk(k, dim=-1).values


def largest_tokens(logits: Tensor, k: int) -> Tensor:
    """The tokens of the k largest logits of each row, downwards: (r, V) -> (r, k) int64."""
    return logits.topk(k, dim=-1).indices


def interpolate(student: Tensor, teacher: Tensor, pairs: Tensor, share: float) -> Tensor:
    """Teacher's rows with their partner of the student mixed in: (1 - t) z_s + t z_t; a row without a partner stays as it is.

    Args:
        student: (n, k) sorted logits; the caller detaches them where they are no part of the gradient.
        teacher: (m, k) sorted logits.
        pairs: (p, 2) int64, rows of student and teacher, none of the teacher's twice.
        share: t, the teacher's share.

    Returns:
        (m, k).
    """
    ours, theirs = pairs.unbind(1)
    return teacher.index_put((theirs,), (1 - share) * student[ours] + share * teacher[theirs])


def l2_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s_i - t_j‖₂, (B, N, d) and (B, M, d) -> (B, N, M); equal vectors have distance 0 with gradient 0.

    It multiplies matrices, in float64, for ‖s‖² + ‖t‖² - 2 s·t loses half of the digits where two vectors are near each other.
    The backward pass of `torch.cdist` makes a tensor (B, N, M, d) on a GPU.
    """
    given = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.double(), teacher.double()
    norms = student.square().sum(-1)[..., :, None] + teacher.square().sum(-1)[..., None, :]
    squares = norms - 2 * student @ teacher.mT
    same = squares <= _SAME * norms  # not `>`: a NaN has to stay one
    return squares.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0).to(given)


def kl_costs(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(t_j ‖ s_i) = Σ_r t_jr (log t_jr - log s_ir) in nats, by two products in float64; there is no (B, N, M, k) tensor.

    Args:
        log_student: (B, N, k) finite log-probabilities.
        log_teacher: (B, M, k) finite log-probabilities.
    """
    given = torch.promote_types(log_student.dtype, torch.float32)
    log_student, log_teacher = log_student.double(), log_teacher.double()
    probabilities = log_teacher.exp()
    negative_entropy = (probabilities * log_teacher).sum(-1)[..., None, :]
    return (negative_entropy - log_student @ probabilities.mT).to(given)


def salience_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """|σ(a_i) - σ(b_j)| of salience logits, (B, N) and (B, M) -> (B, N, M), below 1."""
    return (student.sigmoid()[..., :, None] - teacher.sigmoid()[..., None, :]).abs()


def window_means(states: Tensor, counts: Tensor, reach: int) -> Tensor:
    """Means over the positions of a sequence from i - reach to i + reach, as far as there are any.

    Args:
        states: (B, N, d), 0 on padding.
        counts: (B,) int64, rows of each sequence.
        reach: 0 gives the states themselves; published: 4.

    Returns:
        (B, N, d), 0 on padding.
    """
    width = 2 * reach + 1
    sums = width * F.avg_pool1d(states.mT, width, stride=1, padding=reach).mT
    place = torch.arange(states.shape[1], device=states.device)
    sizes = torch.minimum(place + reach + 1, counts[:, None]) - (place - reach).clamp(min=0)
    return (sums / sizes.clamp(min=1)[..., None]).masked_fill(~mask(counts, states.shape[1])[..., None], 0.0)


def cosine_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of s_i and t_j, (B, N, d) and (B, M, d) -> (B, N, M); a vector of 0 has cosine 0 to all others."""
    student, teacher = (of / (of.norm(dim=-1, keepdim=True) + _CONSTANT) for of in (student, teacher))
    return 1 - student @ teacher.mT


def largest(costs: Tensor, counts: Tensor, teacher_counts: Tensor) -> Tensor:
    """(B,) the largest cost of each sequence, with gradient."""
    return costs.masked_fill(~cells(costs, counts, teacher_counts), 0.0).amax((1, 2))


def in_units_of(costs: Tensor, unit: Tensor) -> Tensor:
    """(B, N, M) costs divided by the unit (B,) of their sequence."""
    return costs / (unit + _CONSTANT)[:, None, None]


def mean_costs(costs: Tensor, counts: Tensor, teacher_counts: Tensor) -> Tensor:
    """(B,) the mean over the cells of each sequence."""
    inside = costs.masked_fill(~cells(costs, counts, teacher_counts), 0.0)
    return inside.sum((1, 2)) / (counts * teacher_counts)


def share_of_mean(costs: Tensor, plan: Tensor, means: Tensor) -> Tensor:
    """⟨P, C⟩ / mean C, (B,): what a plan pays under one of its costs, beside what it would pay if it paired at random.

    It does not depend on the unit of the cost. 1 says that the cost had no say in the plan, or that the plan goes against it as often as
    not; near 0, that the plan pairs what costs little. It is 1 where the mean is 0.

    Args:
        costs: (B, N, M).
        plan: (B, N, M), of mass 1, 0 on padding.
        means: (B,) of `mean_costs`.
    """
    paid = (plan * costs).sum((1, 2))
    nothing = means == 0
    return (paid / means.masked_fill(nothing, 1.0)).masked_fill(nothing, 1.0)


def cells(costs: Tensor, counts: Tensor, teacher_counts: Tensor) -> Tensor:
    """(B, N, M) bool, true on the cells that belong to a sequence."""
    return mask(counts, costs.shape[1])[:, :, None] & mask(teacher_counts, costs.shape[2])[:, None, :]
