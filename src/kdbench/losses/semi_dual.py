"""The semi-dual of entropic optimal transport under several costs at once, and its potential: exact, or by a network as published.

For K costs C_k with weights α on the simplex, rows of mass μ and columns of mass ν, both uniform, it maximises over φ

    L(φ) = ⟨φ, μ⟩ + Σ_k α_k ⟨φ^{c_k}, ν⟩,   φ^{c_k}_j = -ε log Σ_i μ_i exp((φ_i - C_k,ij) / ε)

(multi-cost Wasserstein distillation, AAAI 2026, doi 10.1609/aaai.v40i39.40619; the semi-dual of one cost: Genevay et al. 2016,
arXiv 1605.08527). L is concave. Each cost has a plan P_k = μ_i ν_j exp((φ_i + φ^{c_k}_j - C_k,ij) / ε), which has the columns' masses
exactly; at the maximum Σ_k α_k P_k has the rows' masses as well, and L is the least Σ_k α_k (⟨P_k, C_k⟩ + ε KL(P_k ‖ μ νᵀ)).
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdbench.losses.ot import Transport, sinkhorn
from kdbench.losses.sequences import mask

# The semi-dual as published (class MultiCostSemiDualOT of MCW-KD): exponents kept within ±50, log(μ + 1e-10).
PUBLISHED_SEMI_DUAL = {"epsilon": 0.1, "clamp": 50.0, "floor": 1e-10}


@dataclasses.dataclass(frozen=True)
class SemiDual:
    """Values of the semi-dual, with gradient.

    Attributes:
        value: (B,) L(φ).
        per_cost: (K, B) ⟨φ, μ⟩ + ⟨φ^{c_k}, ν⟩; L is their mean weighted by α.
    """

    value: Tensor
    per_cost: Tensor


def semi_dual(
    costs: Tensor | Sequence[Tensor],
    weights: Tensor,
    potential: Tensor,
    row_counts: Tensor,
    column_counts: Tensor,
    *,
    epsilon: float | Tensor,
    clamp: float | None = None,
    floor: float = 0.0,
) -> SemiDual:
    """L(φ) for every sequence of a batch; differentiable in costs, weights and potential, in float32 or wider.

    With a potential of `semi_dual_potentials`, which carries no gradient, these are the gradients of the maximum over φ (envelope
    theorem): α_k P_k with respect to C_k and `per_cost` (up to a constant, which the simplex does not see) with respect to α_k.

    Args:
        costs: (K, B, N, M), or K tensors (B, N, M); what lies beyond a sequence's rows and columns is never read.
        weights: (K,) α, summing to 1.
        potential: (B, N) φ; finite also on padding, where it is not used.
        row_counts: (B,) int64, rows of each sequence, at least 1.
        column_counts: (B,) int64, columns of each sequence, at least 1.
        epsilon: ε > 0 in units of the cost, a number or (B,).
        clamp: keeps (φ_i - C_ij) / ε within ± this (published: 50).
        floor: constant added to μ inside its logarithm (published: 1e-10).

    Returns:
        A `SemiDual`.
    """
    costs, rows, columns = _masked(costs, row_counts, column_counts)
    wide = costs.dtype
    mu, nu = (real.to(wide) / real.sum(1, keepdim=True) for real in (rows, columns))
    potential = potential.to(wide).masked_fill(~rows, 0.0)
    epsilon = torch.as_tensor(epsilon, dtype=wide, device=costs.device).expand(len(mu))[:, None]
    exponents = (potential[:, :, None] - costs) / epsilon[:, :, None]
    if clamp is not None:
        exponents = exponents.clamp(-clamp, clamp)
    log_mu = (mu + floor).log().masked_fill(~rows, -torch.inf)
    transformed = -epsilon * (exponents + log_mu[:, :, None]).logsumexp(2)
    of_rows, of_columns = (potential * mu).sum(1), (transformed * nu).sum(2)
    return SemiDual(of_rows + (weights.to(wide)[:, None] * of_columns).sum(0), of_rows + of_columns)


@torch.no_grad()
def semi_dual_potentials(
    costs: Tensor | Sequence[Tensor],
    weights: Tensor,
    row_counts: Tensor,
    column_counts: Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    relative: bool = False,
    iterations: int = 200,
    tolerance: float = 1e-3,
    check_every: int = 10,
) -> Transport:
    """The potentials that maximise L, without gradient, by φ ← φ + ε (log μ - log Σ_k α_k P_k 1).

    L is the semi-dual of a single problem: K·M columns of masses α_k ν_j under the costs side by side. The update is Sinkhorn's for
    it. It never lowers L: log t ≤ log s + t/s - 1 bounds L from below, with equality at the current φ, and the update maximises
    the bound.

    Args:
        costs: (K, B, N, M), or K tensors (B, N, M).
        weights: (K,) α ≥ 0, summing to 1.
        row_counts: (B,) int64, rows of each sequence, at least 1.
        column_counts: (B,) int64, columns of each sequence, at least 1.
        epsilon, relative, iterations, tolerance, check_every: as in `sinkhorn`. `relative` is to the mean over all costs.

    Returns:
        The transport of the single problem. `row_potential` (B, N) is φ and `epsilon` (B,) the ε to hand to `semi_dual`; `plan`
        (B, N, K·M) is α_k P_k side by side.
    """
    costs, _, columns = _masked(costs, row_counts, column_counts)
    count, batch, n, m = costs.shape
    nu = columns.to(costs.dtype) / columns.sum(1, keepdim=True)
    return sinkhorn(
        costs.permute(1, 2, 0, 3).reshape(batch, n, count * m),
        row_counts,
        torch.full_like(column_counts, count * m),
        epsilon=epsilon,
        relative=relative,
        iterations=iterations,
        tolerance=tolerance,
        check_every=check_every,
        column_masses=(weights.to(costs.dtype)[:, None] * nu[:, None, :]).reshape(batch, count * m),
        rows_first=True,
    )


class PotentialNetwork(nn.Module):
    """The published φ: tanh of a linear layer over two linear features, of a position and of the mean of its sequence.

    It is here to reproduce the published numbers. Its potentials lie in (-1, 1) and are not optimal; `semi_dual_potentials` are.
    """

    def __init__(self, dimension: int, hidden: int = 256):
        super().__init__()
        self.context = nn.Linear(dimension, hidden)
        self.token = nn.Linear(dimension, hidden)
        self.combine = nn.Linear(2 * hidden, 1)

    def forward(self, states: Tensor, counts: Tensor) -> Tensor:
        """Args: states (B, N, dimension), padded with finite numbers; counts (B,) int64. Returns (B, N), 0 on padding."""
        real = mask(counts, states.shape[1])
        mean = states.masked_fill(~real[:, :, None], 0.0).sum(1) / counts[:, None]
        features = torch.cat(
            [self.context(mean)[:, None, :].expand(-1, states.shape[1], -1), self.token(states)], dim=-1
        )
        return torch.tanh(self.combine(features)[:, :, 0]).masked_fill(~real, 0.0)


def ascend(
    network: nn.Module, value: Callable[[], Tensor], steps: int = 4, learning_rate: float = 0.01, clip: float = 1.0
) -> None:
    """Gradient ascent on a network in place, each entry of the gradient clipped to ± clip: the published inner loop.

    The published code does this for one sequence after the other, on each process for itself, and so the potential depends on the
    order of the sequences. The weights are replaced, not written over, so a graph made before still has the weights it was made with.

    Args:
        network: what is trained, such as a `PotentialNetwork`.
        value: computes the scalar to raise with the network as it is.
        steps: number of steps.
        learning_rate: step size.
        clip: bound of each entry of the gradient.
    """
    parameters = list(network.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(value(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data = parameter.data + learning_rate * gradient.clamp(-clip, clip)


def _masked(
    costs: Tensor | Sequence[Tensor], row_counts: Tensor, column_counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(K, B, N, M) costs, float32 or wider, 0 on padding; (B, N) and (B, M) bool, the real rows and columns."""
    costs = costs if isinstance(costs, Tensor) else torch.stack(list(costs))
    costs = costs.to(torch.promote_types(costs.dtype, torch.float32))
    rows, columns = mask(row_counts, costs.shape[2]), mask(column_counts, costs.shape[3])
    return costs.masked_fill(~(rows[:, :, None] & columns[:, None, :]), 0.0), rows, columns
