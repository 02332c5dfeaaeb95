"""Distillation of next-token distributions across tokenizers, on the tokens that both vocabularies have."""

from typing import Annotated

import torch
from pydantic import Field

from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.sequences import mean_over, partners
from kdbench.losses.vocabulary import over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, Shape, require, require_signal
from kdbench.settings import Float
from kdbench.signals import Head, Signal, Step, Terms, Vocabulary


class SimpleCtkdSettings(DivergenceSettings):
    """Constants of github.com/songmzhang/KDFlow (its defaults, and its example scripts of this method)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the cross entropy with the reference (published 1 - kd_ratio: 0.5)"
    )
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the divergence from the teacher (published kd_ratio: 0.5)"
    )
    temperature: Annotated[Float, Field(gt=0)] = Field(
        1.0, description="divides the logits of both sides in a divergence"
    )


class SimpleCtkd(Method):
    """ce_rate · CE(z_s, y) + kd_rate · Σ over pairs of D(z_s over S, z_t over S) (SimpleCTKD of KDFlow, arXiv 2603.01875).

    Pairs are rows whose targets cover the same bytes. S are the tokens of both vocabularies; both distributions are softmaxes over S alone:
    what either model thinks of other tokens plays no part in D.
    """

    version = 1
    across_tokenizers = True
    Settings = SimpleCtkdSettings

    def __init__(
        self,
        settings: SimpleCtkdSettings,
        student: Shape,
        teacher: Shape | None,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__(settings, student, teacher)
        require("simple_ctkd", "the relation of the vocabularies", vocabulary)
        for name, ids in zip(("student_shared", "teacher_shared"), vocabulary.shared.unbind(1), strict=True):
            self.register_buffer(name, ids, persistent=False)
        self._teacher_head: Head | None = None  # of the shared tokens alone; the teacher's does not change

    @classmethod
    def needs(cls, settings: SimpleCtkdSettings) -> Needs:
        return Needs(teacher="signal", alignment="byte", vocabulary=True)

    def initialize(self, student: Head, teacher: Head) -> None:
        ids = self.teacher_shared
        self._teacher_head = Head(teacher.weight[ids], len(ids), None if teacher.bias is None else teacher.bias[ids])

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("simple_ctkd", teacher)
        require("simple_ctkd", "pairs of rows", step.pairs)
        require("simple_ctkd", "a start from the heads (`initialize`)", self._teacher_head)
        rows = student.rows
        partner, paired = partners(step.pairs, len(rows.targets))

        def row_loss(logits, teacher_logits, targets, paired, share):
            return {
                "ce": cross_entropy(logits, targets),
                "kd": paired * self.settings.divergence(logits.index_select(1, self.student_shared), teacher_logits),
                "aligned": paired.to(logits.dtype),
                "teacher_entropy": share * entropy(teacher_logits),
            }

        return over_vocabulary(
            row_loss,
            [
                (rows.hidden, student.head),
                (teacher.rows.hidden.detach()[partner], self._teacher_head),
            ],
            [rows.targets, paired, mean_over(paired, rows.counts, torch.float32)],
            weights={"ce": self.settings.ce_rate, "kd": self.settings.kd_rate},
            diagnostics=["aligned", "teacher_entropy"],
        )
