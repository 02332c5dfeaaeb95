"""Dual-space distillation between models of one vocabulary."""

from typing import Annotated

from pydantic import Field
from torch import nn

from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.vocabulary import of_tokens, over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, Shape, require_same_tokens, require_signal
from kdbench.settings import Float
from kdbench.signals import Signal, Step, Terms


class DskdSettings(DivergenceSettings):
    """Constants of the published scripts (github.com/songmzhang/DSKD)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the three terms of dual-space distillation"
    )


class Dskd(Method):
    """Dual-space knowledge distillation (Zhang et al. 2024, arXiv 2406.17328, section 3).

    Student and teacher are compared under one head at a time: the teacher's states, projected by t2s, under the student's head
    (z_t2s), and the student's, projected by s2t, under the teacher's head (z_s2t):

        ce_rate · CE(z_s, y) + kd_rate · (CE(z_t2s, y) + D(z_s, sg z_t2s) + KL(z_t ‖ z_s2t))

    The student's head is a constant in z_t2s, so the second term trains t2s alone and the third the student alone.
    """

    version = 1
    across_tokenizers = False
    Settings = DskdSettings

    def __init__(self, settings: DskdSettings, student: Shape, teacher: Shape | None, vocabulary=None):
        super().__init__(settings, student, teacher)
        require_signal("dskd", teacher)
        self.t2s = nn.Linear(teacher.hidden, student.hidden)
        self.s2t = nn.Linear(student.hidden, teacher.hidden)

    @classmethod
    def needs(cls, settings: DskdSettings) -> Needs:
        return Needs(teacher="signal")

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_same_tokens("dskd", student, teacher)
        settings, size, targets = self.settings, student.head.size, student.rows.targets
        student_hidden, teacher_hidden = student.rows.hidden, teacher.rows.hidden.detach()
        student_head, teacher_head = student.head.detach(), teacher.head.detach().of_tokens()

        def student_space(logits, projected, targets):
            return {
                "ce": cross_entropy(logits, targets),
                "t2s_ce": cross_entropy(projected, targets),
                "t2s_kd": settings.divergence(of_tokens(logits, size), of_tokens(projected, size).detach()),
                "t2s_correct": correct(projected, targets),
            }

        def teacher_space(projected, logits, targets):
            return {
                "s2t_kd": settings.divergence(projected, logits, objective="forward_kl"),
                "s2t_correct": correct(projected, targets),
                "teacher_entropy": entropy(logits),
            }

        to_student = self.t2s(teacher_hidden.to(self.t2s.weight.dtype))
        to_teacher = self.s2t(student_hidden.to(self.s2t.weight.dtype))
        return over_vocabulary(
            student_space,
            [(student_hidden, student.head), (to_student, student_head)],
            [targets],
            weights={"ce": settings.ce_rate, "t2s_ce": settings.kd_rate, "t2s_kd": settings.kd_rate},
            diagnostics=["t2s_correct"],
        ) + over_vocabulary(
            teacher_space,
            [(to_teacher, teacher_head), (teacher_hidden, teacher_head)],
            [targets],
            weights={"s2t_kd": settings.kd_rate},
            diagnostics=["s2t_correct", "teacher_entropy"],
        )
