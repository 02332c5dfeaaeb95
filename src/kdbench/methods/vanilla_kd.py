"""Distillation of next-token distributions between models of one vocabulary."""

from typing import Annotated

from pydantic import Field

from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.vocabulary import of_tokens, over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, require_same_tokens
from kdbench.settings import Float
from kdbench.signals import Signal, Step, Terms


class VanillaKdSettings(DivergenceSettings):
    """Constants of the published scripts of DSKD (arXiv 2406.17328) for its white-box baselines."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the divergence from the teacher")


class VanillaKd(Method):
    """ce_rate · CE(z_s, y) + kd_rate · D(z_s, z_t) (Hinton et al. 2015, arXiv 1503.02531, token by token).

    D sees the tokenizer's tokens alone; the cross entropy sees every row of the student's head, as generation does.
    """

    version = 1
    across_tokenizers = False
    Settings = VanillaKdSettings

    @classmethod
    def needs(cls, settings: VanillaKdSettings) -> Needs:
        return Needs(teacher="signal")

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_same_tokens("vanilla_kd", student, teacher)
        size = student.head.size

        def row_loss(student_logits, teacher_logits, targets):
            return {
                "ce": cross_entropy(student_logits, targets),
                "kd": self.settings.divergence(of_tokens(student_logits, size), teacher_logits),
                "teacher_entropy": entropy(teacher_logits),
            }

        return over_vocabulary(
            row_loss,
            [(student.rows.hidden, student.head), (teacher.rows.hidden.detach(), teacher.head.detach().of_tokens())],
            [student.rows.targets],
            weights={"ce": self.settings.ce_rate, "kd": self.settings.kd_rate},
            diagnostics=["teacher_entropy"],
        )
