"""Cross entropy with the reference text."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] per row. A logit that is not finite is not repaired: NaN stays NaN and stops the training.

    Args:
        logits: (r, V) float.
        targets: (r,) int64.

    Returns:
        (r,) nats.
    """
    return F.cross_entropy(logits, targets, reduction="none")


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the most likely token is the target, else 0; without gradient.

    Args:
        logits: (r, V) float.
        targets: (r,) int64.

    Returns:
        (r,) of the dtype of `logits`.
    """
    return (logits.argmax(-1) == targets).to(logits.dtype)
