"""Student and method as one module: what an engine wraps, shards and steps."""

import torch
from torch import Tensor, nn

from kdbench import models
from kdbench.data.batches import Side
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.vocabulary import over_vocabulary
from kdbench.methods.base import Method
from kdbench.settings import Training
from kdbench.signals import Head, Signal, Step, Terms


class Distiller(nn.Module):
    """A student under a method's loss.

    The head's weight is read and the loss computed inside this forward pass, because outside of it ZeRO stage 3 leaves nothing but
    shards of a weight. For the same reason the result is a tuple: its hooks do not see tensors in objects of our own.

    Attributes:
        student: causal language model.
        method: its loss, with what that learns.
        names: the values after the total that the last forward pass returned.
        packed: whether the student reads batches without padding.
    """

    def __init__(self, student: nn.Module, method: Method, size: int, training: Training):
        super().__init__()
        self.student, self.method = student, method
        self.names: tuple[str, ...] = ()
        self.packed = models.pack(student)
        self._size, self._narrow = size, training.precision == "bf16"

    @torch.no_grad()
    def initialize(self, teacher: Head) -> None:
        """Let the method start from the two heads."""
        self.method.initialize(models.head(self.student, self._size).detach(), teacher)

    def forward(self, side: Side, teacher: Signal | None = None, step: Step | None = None) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch.

        Args:
            side: the student's tensors.
            teacher: the teacher's signal of the same records, or None.
            step: without it the loss is the cross entropy with the reference, as for the dev loss.

        Returns:
            The total (scalar, with gradient), and detached sums over response tokens (k,): the total, then `names`.
        """
        with torch.autocast(side.input_ids.device.type, torch.bfloat16, enabled=self._narrow):
            student = models.signal(self.student, side, self._size)
            terms = _reference(student) if step is None else self.method(student, teacher, step)
        values = terms.sums | terms.diagnostics
        self.names = tuple(values)
        return terms.total, torch.stack([value.detach().float() for value in (terms.total, *values.values())])


def _reference(student: Signal) -> Terms:
    rows = student.rows
    return over_vocabulary(
        lambda logits, targets: {"ce": cross_entropy(logits, targets)}, [(rows.hidden, student.head)], [rows.targets]
    )
