"""The teacher in memory, run in every step."""

import torch

from kdbench import models
from kdbench.data.batches import Side
from kdbench.signals import Head, Signal


class Live:
    """A teacher that is run for each batch.

    Args:
        model: causal language model in evaluation mode, on its device.
        size: number of tokens of its tokenizer.
    """

    def __init__(self, model, size: int):
        self.model, self.size = model, size
        models.pack(model)

    def signal(self, rows: list[int], side: Side, device) -> Signal:
        """See `TeacherSource`."""
        with torch.no_grad():
            found = models.signal(self.model, side.to(device), self.size)
        return Signal(found.rows, found.head.detach(), found.embed)

    def head(self, device) -> Head:
        """See `TeacherSource`."""
        return models.head(self.model, self.size).detach()
