"""Universal logit distillation: across tokenizers, by the shape of the distributions alone."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from kdbench.losses import chunks
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.uld import sorted_l1
from kdbench.losses.vocabulary import over_vocabulary
from kdbench.methods.base import Method, MethodSettings, Needs, require, require_signal
from kdbench.settings import Float
from kdbench.signals import Signal, Step, Terms


class UldSettings(MethodSettings):
    """Constants of the scripts of MCW-KD; the paper's kd_rate is 1.5, on a mean over tokens."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(1.0, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="weight of the distance between sorted distributions"
    )
    alignment: Literal["index", "byte"] = Field(
        "index",
        description="which response tokens are compared: the k-th with the k-th (published), or those that cover the same bytes",
    )


class Uld(Method):
    """ce_rate · CE(z_s, y) + kd_rate · Σ over pairs of sorted L1 (Boizard et al. 2024, arXiv 2402.12030)."""

    version = 1
    across_tokenizers = True
    Settings = UldSettings

    @classmethod
    def needs(cls, settings: UldSettings) -> Needs:
        return Needs(teacher="signal", alignment=settings.alignment)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("uld", teacher)
        require("uld", "pairs of rows", step.pairs)
        ours, theirs = step.pairs.unbind(1)
        reference = over_vocabulary(
            lambda logits, targets: {"ce": cross_entropy(logits, targets)},
            [(student.rows.hidden, student.head)],
            [student.rows.targets],
            weights={"ce": self.settings.ce_rate},
        )
        weight = chunks.mean_weights(student.rows.sequence[ours], student.rows.counts, torch.float32)

        def row_loss(z_s, z_t, weight):
            return {"uld": sorted_l1(z_s, z_t), "teacher_entropy": weight * entropy(z_t)}

        terms = reference + over_vocabulary(
            row_loss,
            [
                (student.rows.hidden[ours], student.head.of_tokens()),
                (teacher.rows.hidden.detach()[theirs], teacher.head.detach().of_tokens()),
            ],
            [weight],
            weights={"uld": self.settings.kd_rate},
            diagnostics=["teacher_entropy"],
        )
        terms.diagnostics["aligned"] = torch.ones_like(ours).sum()
        return terms
