"""Dual-space distillation across tokenizers: at the tokens that both tokenizers cut out of the text."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.projection import cross_product, inverse_factor
from kdbench.losses.sequences import mean_over, partners
from kdbench.losses.vocabulary import of_tokens, over_vocabulary, rows_over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, Shape, require, require_signal
from kdbench.settings import Bool, Float
from kdbench.signals import Head, Signal, Step, Terms, Vocabulary


class DskdEtaSettings(DivergenceSettings):
    """Constants of github.com/songmzhang/DSKDv2; its projectors train at 5e-4 (`projector_learning_rate`)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the three terms of dual-space distillation"
    )
    student_space: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="weight of the two terms under the student's head within that (published only_tea_kd: 0)"
    )
    teacher_space: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="weight of the term under the teacher's head within that (published only_stu_kd: 0)"
    )
    agreement: Annotated[Float, Field(ge=0, le=1)] = Field(
        1.0,
        description="share of agreeing rows in the last step above which all labelled rows count in the student's space, not the agreeing "
        "ones alone (published t2s_agreement: 1, never)",
    )
    renormalise: Bool = Field(
        False,
        description="take the terms of distillation as means over the rows of a sequence that count, instead of sums "
        "(published: means over those of a micro-batch)",
    )
    initial_t2s: Bool = Field(
        True, description="start t2s from the least-squares map between the heads (published init_t2s_projector)"
    )


class DskdEta(Method):
    """Dual-space distillation with exact token alignment (Zhang et al. 2025, arXiv 2504.11426; DSKDv2).

    Rows whose targets cover the same bytes are pairs. Of a pair (i, j), a = argmax z_t(j) is the teacher's choice and â the same token in
    the student's vocabulary. A pair without â counts in no term of distillation; one with argmax z_t2s(i) = â agrees:

        z_t2s(i) = P_t2s h_t(j) sg(W_s)ᵀ,  z_s2t(i) = h_s(i) P_s2t W_tᵀ,  P_s2t = sg(S_s)ᵀ pinv(S_t)ᵀ
        ce_rate · CE(z_s, y) + kd_rate · Σ over pairs with â of (CE(z_t2s, â) + [agrees] D(z_s, sg z_t2s) + D(z_s2t, z_t))

    S_s, S_t (k, d) are the rows of W_s, W_t of the tokens that both vocabularies have. P_t2s starts from pinv(S_s) S_t and is trained by
    its cross entropy; P_s2t is not trained: it is computed from the student's head in every step, as a constant.
    """

    version = 1
    across_tokenizers = True
    Settings = DskdEtaSettings

    def __init__(
        self,
        settings: DskdEtaSettings,
        student: Shape,
        teacher: Shape | None,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__(settings, student, teacher)
        require_signal("dskd_eta", teacher)
        require("dskd_eta", "the relation of the vocabularies", vocabulary)
        shared = vocabulary.shared
        label = torch.full((teacher.vocabulary,), -1, dtype=torch.long, device=shared.device)
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("label", label.index_put((shared[:, 1],), shared[:, 0]), persistent=False)
        self.t2s = nn.Linear(teacher.hidden, student.hidden, bias=False)
        # No buffer: an engine in bfloat16 would round it. It is made anew by `initialize` in every attempt.
        self.teacher_factor = torch.zeros(teacher.hidden, teacher.hidden)
        self._agreement = 0.0
        self._s2t: Tensor | None = None  # of the present step

    @classmethod
    def needs(cls, settings: DskdEtaSettings) -> Needs:
        return Needs(teacher="signal", alignment="byte", vocabulary=True)

    def initialize(self, student: Head, teacher: Head) -> None:
        with torch.no_grad():
            self.teacher_factor = inverse_factor(teacher.weight, self.shared[:, 1]).to(self.t2s.weight.dtype)
            if self.settings.initial_t2s:
                factor = inverse_factor(student.weight, self.shared[:, 0])
                product = cross_product(student.weight, teacher.weight, self.shared, torch.float64)
                self.t2s.weight.copy_(factor @ (factor.T @ product))

    def observe(self, sums: dict[str, float], tokens: int, step: int) -> dict[str, float]:
        self._s2t = None  # the student's head has moved
        if sums["labelled"]:
            self._agreement = sums["t2s_agreed"] / sums["labelled"]
        return {"t2s_agreement": self._agreement}

    def state(self) -> dict:
        return {"agreement": self._agreement}

    def restore(self, state: dict) -> None:
        self._agreement = state["agreement"]

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("dskd_eta", teacher)
        require("dskd_eta", "pairs of rows", step.pairs)
        settings, size = self.settings, student.head.size
        rows, student_head, teacher_head = student.rows, student.head.detach(), teacher.head.detach().of_tokens()
        partner, paired = partners(step.pairs, len(rows.targets))
        teacher_hidden = teacher.rows.hidden.detach()[partner]
        to_student = self.t2s(teacher_hidden.to(self.t2s.weight.dtype))
        to_teacher = self._to_teacher(rows.hidden, student_head, teacher_head)
        only_agreeing = self._agreement <= settings.agreement

        def counted(projected, teacher_logits, paired):
            """The label of each row, whether it has one, and whether the projected teacher agrees with it."""
            label = self.label[teacher_logits.argmax(-1)]
            labelled = paired & (label >= 0)
            return label.clamp(min=0), labelled, labelled & (projected.argmax(-1) == label)

        def row_loss(logits, projected, projected_student, teacher_logits, targets, paired, share, mean, mean_kd):
            label, labelled, agreed = counted(projected, teacher_logits, paired)
            chosen = agreed if only_agreeing else labelled
            in_student_space = settings.divergence(of_tokens(logits, size), of_tokens(projected, size).detach())
            in_teacher_space = settings.divergence(projected_student, teacher_logits)
            return {
                "ce": cross_entropy(logits, targets),
                "t2s_ce": mean * labelled * cross_entropy(projected, label),
                "t2s_kd": mean_kd * chosen * in_student_space,
                "s2t_kd": mean * labelled * in_teacher_space,
                "aligned": paired.to(logits.dtype),
                "labelled": labelled.to(logits.dtype),
                "t2s_agreed": agreed.to(logits.dtype),
                "t2s_correct": labelled * correct(projected, targets),
                "teacher_entropy": share * entropy(teacher_logits),
            }

        means = self._means(
            counted, only_agreeing, (to_student, student_head), (teacher_hidden, teacher_head), rows, paired
        )
        rate = settings.kd_rate
        return over_vocabulary(
            row_loss,
            [
                (rows.hidden, student.head),
                (to_student, student_head),
                (to_teacher, teacher_head),
                (teacher_hidden, teacher_head),
            ],
            [rows.targets, paired, mean_over(paired, rows.counts, torch.float32), *means],
            weights={
                "ce": settings.ce_rate,
                "t2s_ce": rate * settings.student_space,
                "t2s_kd": rate * settings.student_space,
                "s2t_kd": rate * settings.teacher_space,
            },
            diagnostics=["aligned", "labelled", "t2s_agreed", "t2s_correct", "teacher_entropy"],
        )

    def _to_teacher(self, hidden: Tensor, student_head: Head, teacher_head: Head) -> Tensor:
        """h_s P_s2t, (n, d_t); the map is a constant, made once for all micro-batches of a step."""
        dtype = self.teacher_factor.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            if self._s2t is None:
                product = cross_product(student_head.weight, teacher_head.weight, self.shared, dtype)
                self._s2t = product @ self.teacher_factor @ self.teacher_factor.T
            return hidden.to(dtype) @ self._s2t

    def _means(self, counted, only_agreeing, projected, teacher, rows, paired) -> tuple[Tensor, Tensor]:
        """(n,) twice, the weights of labelled rows and of those that count in the divergence in the student's space."""
        wide = torch.promote_types(rows.hidden.dtype, torch.float32)
        weights = torch.ones(2, len(paired), dtype=wide, device=paired.device)
        if self.settings.renormalise:
            with torch.no_grad():
                found = rows_over_vocabulary(
                    lambda *of: torch.stack(counted(*of)[1:], -1), [projected, teacher], [paired]
                )
            chosen = found[:, 0], found[:, int(only_agreeing)]
            weights = torch.stack([mean_over(of, rows.counts, wide) for of in chosen])
        return weights.unbind(0)
