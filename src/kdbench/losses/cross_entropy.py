"""Cross entropy with the reference text."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] per row. A logit that is not finite is not repaired: NaN stays NaN and stops the training.

    Args:
        logits: (r, V) float.
        targets: (r,) int64.

    Returns:
        (r,) nats.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    """What autograd would do of itself, in half as many passes over the logits."""

    @staticmethod
    def forward(ctx, logits, targets):
        targets = targets[:, None]
        probabilities = logits.softmax(-1)
        ctx.save_for_backward(probabilities, targets)
        # log softmax of the largest logit, and how far below it the target is: exact where the target is the likely one.
        return (logits.amax(-1) - logits.gather(-1, targets)[:, 0]) - probabilities.amax(-1).log()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        probabilities, targets = ctx.saved_tensors
        upstream = upstream[:, None]
        return (probabilities * upstream).scatter_add_(-1, targets, -upstream), None


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the most likely token is the target, else 0; without gradient.

    Args:
        logits: (r, V) float.
        targets: (r,) int64.

    Returns:
        (r,) of the dtype of `logits`.
    """
    return (logits.argmax(-1) == targets).to(logits.dtype)


def largest_probability(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """The probability of the most likely token, from the cross entropies of the targets: no softmax is needed again; without gradient.

    Args:
        logits: (r, V) float.
        targets: (r,) int64.
        losses: (r,) of `cross_entropy`.

    Returns:
        (r,) of the dtype of `logits`.
    """
    logits = logits.detach()
    return (logits.amax(-1) - logits.gather(-1, targets[:, None])[:, 0] - losses.detach()).exp()
