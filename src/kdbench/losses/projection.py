"""Linear maps between the spaces of two language model heads, by least squares over the tokens that both have."""

import torch
from torch import Tensor

_CHUNK = 2**13  # tokens whose weights are copied at once


def cross_product(one: Tensor, other: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over shared tokens of (weight of the one head) ⊗ (weight of the other).

    Args:
        one: (V_1, d_1) weight of a head.
        other: (V_2, d_2) weight of a head.
        shared: (k, 2) int64, ids of a token in both.
        dtype: that the products are computed in.

    Returns:
        (d_1, d_2).
    """
    total = torch.zeros(one.shape[1], other.shape[1], dtype=dtype, device=one.device)
    with torch.autocast(one.device.type, enabled=False):
        for ids in shared.split(_CHUNK):
            total += one[ids[:, 0]].to(dtype).T @ other[ids[:, 1]].to(dtype)
    return total


def inverse_factor(weight: Tensor, ids: Tensor) -> Tensor:
    """F with F Fᵀ = (Wᵀ W)⁺, W the rows `ids` of a head, so that pinv(W) = F Fᵀ Wᵀ.

    Singular values of W below max(k, d) · 2⁻²³ of the largest are taken for 0, as `torch.linalg.pinv` does in float32. They are found from
    Wᵀ W in float64, where the squares of all that are kept are far above its round-off.

    Args:
        weight: (V, d).
        ids: (k,) int64.

    Returns:
        (d, d) float64; columns that belong to singular values of 0 are 0.
    """
    values, vectors = torch.linalg.eigh(cross_product(weight, weight, ids[:, None].expand(-1, 2), torch.float64))
    cutoff = (max(len(ids), weight.shape[1]) * torch.finfo(torch.float32).eps) ** 2 * values[-1]
    return vectors * torch.where(values > cutoff, values.clamp(min=0).rsqrt(), 0.0)
