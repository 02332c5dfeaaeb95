"""Entropic optimal transport between the positions of padded sequences, and the weights of several costs.

The problem, for costs C (n, m) and masses a (n,), b (m,):  OT_ε(C) = min_P ⟨P, C⟩ + ε KL(P ‖ a bᵀ)  subject to  P 1 = a, Pᵀ 1 = b
(Cuturi 2013, arXiv 1306.0895). Its solution is P = diag(u) exp(-C/ε) diag(v); Sinkhorn's iterations find u and v.
"""

import dataclasses

import torch
from torch import Tensor

from kdbench.losses.sequences import mask

# The Sinkhorn of multi-cost Wasserstein distillation as published (class ETP of MCW-KD): K = exp(-0.1 C), a small constant in the
# divisions, a look at the error after iterations 1 and 51, gradients through the iterations.
PUBLISHED_ETP = {
    "epsilon": 10.0,
    "relative": False,
    "iterations": 100,
    "tolerance": 1e-9,
    "check_every": 50,
    "floor": 1e-9,
    "unrolled": True,
}
# The sequence-level Sinkhorn of multi-level OT as published (arXiv 2412.14528; class Sinkhorn_seq): rows and columns of exp(-C/0.1)
# normalised to 1 in turn, ten times, so that the mass is the number of columns; gradients through the iterations.
PUBLISHED_SEQUENCE = {
    "epsilon": 0.1,
    "relative": False,
    "iterations": 10,
    "tolerance": 0.0,
    "row_masses": 1.0,
    "column_masses": 1.0,
    "rows_first": True,
    "unrolled": True,
}


@dataclasses.dataclass(frozen=True)
class Transport:
    """Transport plans of a batch of sequences, and what they cost. Padding is 0 everywhere.

    Attributes:
        value: (B,) ⟨P, C⟩, with gradient.
        entropic: (B,) ⟨P, C⟩ + ε KL(P ‖ a bᵀ), with gradient.
        plan: (B, N, M) P, detached.
        row_potential: (B, N) φ, detached, in units of the cost: P_ij = a_i b_j exp((φ_i + ψ_j - C_ij) / ε).
        column_potential: (B, M) ψ, detached.
        error: (B,) Σ|P 1 - a| + Σ|Pᵀ 1 - b|, detached.
        iterations: (B,) int64, how many were done.
        epsilon: (B,) ε in units of the cost, detached.
    """

    value: Tensor
    entropic: Tensor
    plan: Tensor
    row_potential: Tensor
    column_potential: Tensor
    error: Tensor
    iterations: Tensor
    epsilon: Tensor


def sinkhorn(
    cost: Tensor,
    row_counts: Tensor,
    column_counts: Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    relative: bool = True,
    iterations: int = 200,
    tolerance: float = 1e-3,
    check_every: int = 10,
    row_masses: float | Tensor | None = None,
    column_masses: float | Tensor | None = None,
    rows_first: bool = False,
    floor: float = 0.0,
    unrolled: bool = False,
) -> Transport:
    """Entropic optimal transport for every sequence of a batch, in the log domain, in float32 or wider.

    Gradients. By default the plan is a constant: the gradient of `value` and of `entropic` with respect to C is P. By the envelope
    theorem (Danskin) that is the gradient of OT_ε(C) = `entropic` at convergence; it is not that of ⟨P(C), C⟩, whose plan moves with C.
    With `unrolled` it is the gradient of the returned numbers through all iterations. ε is a constant of either.

    A sequence stops at the first check where Σ|Pᵀ 1 - b| is below the tolerance (P 1 = a holds by then) and keeps its plan
    while others go on, so that it does not depend on its batch. Costs of 0 give the plan a bᵀ.

    Args:
        cost: (B, N, M) finite costs; what lies beyond a sequence's rows and columns is never read.
        row_counts: (B,) int64, rows of each sequence, at least 1.
        column_counts: (B,) int64, columns of each sequence, at least 1.
        epsilon: ε > 0, a number or (B,).
        relative: ε is a multiple of the sequence's mean |cost| (over its own cells), else in units of the cost.
        iterations: at most, at least 1; one is an update of the columns and one of the rows.
        tolerance: of the L1 marginal error; 0 does all iterations.
        check_every: checks come after iterations 1, 1 + check_every, 1 + 2 check_every and so on; each waits for the device.
        row_masses: a, a number for every row or (B, N); by default 1 / row count.
        column_masses: b, a number for every column or (B, M); by default 1 / column count.
        rows_first: updates the rows before the columns in each iteration; it is then Σ|P 1 - a| that is checked.
        floor: constant added to K v and Kᵀ u before dividing by them. The published code has one; with it the masses are not quite met.
        unrolled: lets the gradient flow through the iterations.

    Returns:
        A `Transport`.
    """
    wide = torch.promote_types(cost.dtype, torch.float32)
    a = _masses(row_masses, row_counts, cost.shape[1], wide)
    b = _masses(column_masses, column_counts, cost.shape[2], wide)
    cells = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    cost = cost.to(wide).masked_fill(~cells, 0.0)
    if relative:
        epsilon = _relative(epsilon, cost, cells)
    epsilon = torch.as_tensor(epsilon, dtype=wide, device=cost.device).detach().expand(len(cost))
    with torch.set_grad_enabled(unrolled and torch.is_grad_enabled()):
        log_kernel = -cost / epsilon[:, None, None]
        log_u, log_v, done = _iterate(
            log_kernel, a.log(), b.log(), iterations, tolerance, check_every, rows_first, floor
        )
        plan = (log_u[:, :, None] + log_kernel + log_v[:, None, :]).exp()
        row_potential = epsilon[:, None] * (log_u - a.log()).masked_fill(a == 0, 0.0)
        column_potential = epsilon[:, None] * (log_v - b.log()).masked_fill(b == 0, 0.0)
    value = (plan * cost).sum((1, 2))
    # P is exp of the potentials and -C/ε, so ⟨P, C⟩ cancels in ⟨P, C⟩ + ε KL.
    entropic = (plan.sum(2) * row_potential).sum(1) + (plan.sum(1) * column_potential).sum(1)
    if not unrolled:
        entropic = value + (entropic - value).detach()
    plan = plan.detach()
    return Transport(
        value=value,
        entropic=entropic,
        plan=plan,
        row_potential=row_potential.detach(),
        column_potential=column_potential.detach(),
        error=(plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1),
        iterations=done,
        epsilon=epsilon,
    )


def sinkhorn_divergence(
    cost_xy: Tensor,
    cost_xx: Tensor,
    cost_yy: Tensor,
    row_counts: Tensor,
    column_counts: Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    relative: bool = True,
    entropic: bool = True,
    **settings,
) -> Transport:
    """OT(x, y) - ½ OT(x, x) - ½ OT(y, y): 0 for x = y, which OT_ε alone is not (Feydy et al. 2019, arXiv 1810.08278).

    All three problems have the ε of the first. With the plans constant the gradient is the same for both values of `entropic`.

    Args:
        cost_xy: (B, N, M) costs between x and y.
        cost_xx: (B, N, N) costs within x.
        cost_yy: (B, M, M) costs within y.
        row_counts: (B,) int64, positions of x.
        column_counts: (B,) int64, positions of y.
        epsilon: ε > 0, a number or (B,).
        relative: ε is a multiple of the mean of `cost_xy`.
        entropic: OT is `Transport.entropic` (as in the paper), else `Transport.value`.
        settings: further arguments of `sinkhorn`, other than the masses.

    Returns:
        The transport between x and y, with the divergence as its `value` and `entropic`; `error` and `iterations` are the largest
        of the three problems.
    """
    xy = sinkhorn(cost_xy, row_counts, column_counts, epsilon=epsilon, relative=relative, **settings)
    within = settings | {"epsilon": xy.epsilon, "relative": False}
    xx = sinkhorn(cost_xx, row_counts, row_counts, **within)
    yy = sinkhorn(cost_yy, column_counts, column_counts, **within)
    of_xy, of_xx, of_yy = ((t.entropic if entropic else t.value) for t in (xy, xx, yy))
    value = of_xy - (of_xx + of_yy) / 2
    return dataclasses.replace(
        xy,
        value=value,
        entropic=value,
        error=torch.stack([xy.error, xx.error, yy.error]).amax(0),
        iterations=torch.stack([xy.iterations, xx.iterations, yy.iterations]).amax(0),
    )


def project_to_simplex(point: Tensor, floor: float = 0.0) -> Tensor:
    """The nearest point of {a: Σ a = 1, a ≥ floor} in Euclidean distance, by sorting (Duchi et al. 2008, fig. 1).

    Args:
        point: (..., K) float.
        floor: at most 1 / K.

    Returns:
        (..., K).

    Raises:
        ValueError: the floor leaves no such point.
    """
    size = point.shape[-1]
    mass = 1 - size * floor
    if mass < 0:
        raise ValueError(f"{size} weights of at least {floor} sum to more than 1")
    descending = point.sort(dim=-1, descending=True).values
    counts = torch.arange(1, size + 1, dtype=point.dtype, device=point.device)
    thresholds = (descending.cumsum(-1) - mass) / counts
    kept = (descending >= thresholds).sum(-1, keepdim=True)
    return (point - thresholds.gather(-1, kept - 1)).clamp(min=0) + floor


def cost_weights(costs: Tensor, sigma: float, floor: float) -> Tensor:
    """argmin over weights α of Σ_k α_k c_k + σ Σ_k (α_k - 1/K)², Σ α = 1, α ≥ floor: a projection of 1/K - c / (2σ).

    Args:
        costs: (..., K) c, mean costs.
        sigma: σ > 0; the larger, the nearer the weights are to 1/K.
        floor: at most 1 / K.

    Returns:
        (..., K).
    """
    return project_to_simplex(1 / costs.shape[-1] - costs / (2 * sigma), floor)


def _masses(masses: float | Tensor | None, counts: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """(B, longest): given or uniform masses on the real positions, 0 on padding."""
    real = mask(counts, longest).to(dtype)
    return real / counts[:, None] if masses is None else real * masses


def _relative(epsilon: float | Tensor, cost: Tensor, cells: Tensor) -> Tensor:
    """(B,) ε as a multiple of the mean cost; 1 where that is 0, as any ε will do for costs of 0."""
    scaled = epsilon * cost.detach().abs().sum((1, 2)) / cells.sum((1, 2))
    return torch.where(scaled >= torch.finfo(cost.dtype).tiny, scaled, 1.0)


def _iterate(log_kernel, log_a, log_b, iterations, tolerance, check_every, rows_first, floor):
    """log u (B, N), log v (B, M) and the number of iterations (B,). Masses of 0 have log u or log v of -inf, never a NaN."""
    # Where the other side starts matters with a floor only; the published codes start from the masses.
    log_u, log_v = log_a, log_b
    running = torch.ones(len(log_kernel), 1, dtype=torch.bool, device=log_kernel.device)
    done = torch.zeros(len(log_kernel), dtype=torch.int64, device=log_kernel.device)

    def row_sums(log_v):
        return (log_kernel + log_v[:, None, :]).logsumexp(2)

    def column_sums(log_u):
        return (log_kernel + log_u[:, :, None]).logsumexp(1)

    def floored(log_sums):
        return torch.logaddexp(log_sums, log_sums.new_tensor(floor).log()) if floor else log_sums

    for iteration in range(iterations):
        if rows_first:
            new_u = log_a - floored(row_sums(log_v))
            new_v = log_b - floored(column_sums(new_u))
        else:
            new_v = log_b - floored(column_sums(log_u))
            new_u = log_a - floored(row_sums(new_v))
        log_u, log_v = torch.where(running, new_u, log_u), torch.where(running, new_v, log_v)
        done += running[:, 0]
        if tolerance and iteration % check_every == 0:
            with torch.no_grad():
                log_sums, log_masses = (
                    (log_u + row_sums(log_v), log_a) if rows_first else (log_v + column_sums(log_u), log_b)
                )
                gap = (log_sums.exp() - log_masses.exp()).abs().sum(1, keepdim=True)
            # Not `>=`: an error of NaN must not pass for convergence.
            running = running & ~(gap < tolerance)
            if not running.any():
                break
    return log_u, log_v, done
