"""Supervised fine-tuning on the reference responses: the baseline of every table, and how a teacher is made."""

from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.vocabulary import over_vocabulary
from kdbench.methods.base import Method, MethodSettings
from kdbench.signals import Signal, Step, Terms


class SftSettings(MethodSettings):
    """Fine-tuning has no settings of its own."""


class Sft(Method):
    """Cross entropy with the reference response."""

    version = 1
    across_tokenizers = True
    Settings = SftSettings

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        rows = student.rows
        return over_vocabulary(
            lambda logits, targets: {"ce": cross_entropy(logits, targets)},
            [(rows.hidden, student.head)],
            [rows.targets],
        )
