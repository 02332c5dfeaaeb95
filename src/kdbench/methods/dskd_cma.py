"""Dual-space distillation across tokenizers: rows are matched by attention between the two models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.losses.attention import cross_attention, deviation
from kdbench.losses.cross_entropy import correct, cross_entropy, largest_probability
from kdbench.losses.divergences import entropy
from kdbench.losses.sequences import mean_over
from kdbench.losses.vocabulary import of_tokens, over_vocabulary, rows_over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, Shape, require_signal
from kdbench.settings import Bool, Float
from kdbench.signals import Rows, Signal, Step, Terms


class DskdCmaSettings(DivergenceSettings):
    """Constants of the published scripts (github.com/songmzhang/DSKD)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the three terms of dual-space distillation"
    )
    teacher_temperature: Annotated[Float, Field(gt=0)] = Field(
        1.0, description="divides the projected teacher's logits in the student's space, besides `temperature`"
    )
    renormalise: Bool = Field(
        False,
        description="take the divergence in the student's space as a mean over a sequence's correct rows instead of a sum; published: no",
    )
    deviation: Literal["sequence", "batch"] = Field(
        "sequence",
        description="response rows over which states and embeddings get standard deviation 1; `batch` depends on micro-batches "
        "(published: batch, with prompts and padding)",
    )
    causal: Bool = Field(
        False,
        description="attend only to states that have read no more of the response than the row itself; published: no",
    )
    target_in_values: Bool = Field(
        True, description="add the embedding of the teacher's target to its values (published; KDFlow has left it out)"
    )


@dataclass(frozen=True)
class Look:
    """Called with the logits (r, V) of a few rows at a time, all of them once and in their order, without gradient."""

    at_student: Callable[[Tensor], None]
    at_teacher: Callable[[Tensor], None]


class DskdCma(Method):
    """Dual-space distillation with cross-model attention (Zhang et al. 2024, arXiv 2406.17328, section 3.3).

    With E the input embeddings, x the token that a row has read and y its target, N(a) = a / std(a), all within one sequence:

        Q = P_q [E_s(x); E_s(y)],  K = N([E_t(x); E_t(y)]),  V_t = P_t2s (N(h_t) + N(E_t(y))),  V_s = P_s2t h_s
        z_t2s = softmax(Q Kᵀ / √(2 d_t)) V_t W_sᵀ,  z_s2t = softmax(K Qᵀ / √(2 d_t)) V_s W_tᵀ
        ce_rate · CE(z_s, y_s) + kd_rate · (CE(z_t2s, y_s) + Σ over rows with argmax z_t2s = y_s of D(z_s, sg z_t2s) + KL(z_t ‖ z_s2t))

    The embeddings and the student's head are constants in all but the first term.
    """

    version = 1
    across_tokenizers = True
    Settings = DskdCmaSettings

    def __init__(self, settings: DskdCmaSettings, student: Shape, teacher: Shape | None, vocabulary=None):
        super().__init__(settings, student, teacher)
        require_signal("dskd_cma", teacher)
        if settings.target_in_values and teacher.embedding != teacher.hidden:
            raise UserError(
                f"cross-model attention adds the teacher's states to its embeddings, but they are {teacher.hidden} and "
                f"{teacher.embedding} wide: set `target_in_values: false`, or choose another method"
            )
        self.query = nn.Linear(2 * student.embedding, 2 * teacher.embedding)
        self.t2s = nn.Linear(teacher.hidden, student.hidden)
        self.s2t = nn.Linear(student.hidden, teacher.hidden)

    @classmethod
    def needs(cls, settings: DskdCmaSettings) -> Needs:
        return Needs(teacher="signal", chunks=settings.causal)

    def forward(self, student: Signal, teacher: Signal | None, step: Step, look: Look | None = None) -> Terms:
        """The loss. What `look` is for: a method that builds on this one need not make the same logits again."""
        require_signal("dskd_cma", teacher)
        settings, size = self.settings, student.head.size
        ours, theirs = student.rows, teacher.rows
        student_head, teacher_head = student.head.detach(), teacher.head.detach().of_tokens()
        to_student, to_teacher = self.mixtures(student, teacher, step)
        weight = self._weight(to_student.detach(), student_head, ours)
        # Teacher's rows count as many as the student's rows of their sequence, so that sums of both kinds have the same denominator.
        share = (ours.counts / theirs.counts)[theirs.sequence]

        def student_space(logits, projected, targets, weight):
            if look is not None:
                look.at_student(of_tokens(logits, size).detach())
            right = correct(projected, targets)
            anchor = cross_entropy(projected, targets)
            target_logits = of_tokens(projected, size).detach()
            if settings.teacher_temperature != 1:
                target_logits = target_logits / settings.teacher_temperature
            return {
                "ce": cross_entropy(logits, targets),
                "t2s_ce": anchor,
                "t2s_kd": weight * right * settings.divergence(of_tokens(logits, size), target_logits),
                "t2s_correct": right,
                "max_t2s_prob": largest_probability(projected, targets, anchor),
            }

        def teacher_space(projected, logits, targets, share):
            if look is not None:
                look.at_teacher(logits)
            return {
                "s2t_kd": settings.divergence(projected, logits, objective="forward_kl"),
                "s2t_correct": share * correct(projected, targets),
                "teacher_entropy": share * entropy(logits),
            }

        return over_vocabulary(
            student_space,
            [(ours.hidden, student.head), (to_student, student_head)],
            [ours.targets, weight],
            weights={"ce": settings.ce_rate, "t2s_ce": settings.kd_rate, "t2s_kd": settings.kd_rate},
            diagnostics=["t2s_correct", "max_t2s_prob"],
        ) + over_vocabulary(
            teacher_space,
            [(to_teacher, teacher_head), (theirs.hidden.detach(), teacher_head)],
            [theirs.targets, share],
            weights={"s2t_kd": settings.kd_rate},
            diagnostics=["s2t_correct", "teacher_entropy"],
        )

    def mixtures(self, student: Signal, teacher: Signal, step: Step) -> tuple[Tensor, Tensor]:
        """The teacher's states for each row of the student, (n, d_s), and the student's for each row of the teacher, (m, d_t)."""
        if self.settings.causal and step.chunks is None:
            raise ValueError("causal cross-model attention asks for chunks of rows and got none")
        dtype = self.query.weight.dtype
        ours, theirs = student.rows, teacher.rows
        read, target = (_embedded(teacher, ids) for ids in (theirs.inputs, theirs.targets))
        hidden, index = theirs.hidden.detach(), torch.cat([read, target], dim=-1)
        index_deviation, target_deviation, hidden_deviation = self.deviations(index, target, hidden, theirs.counts)
        values = hidden / hidden_deviation
        if self.settings.target_in_values:
            values = values + target / target_deviation
        index_of_student = torch.cat([_embedded(student, ours.inputs), _embedded(student, ours.targets)], dim=-1)
        return cross_attention(
            self.query(index_of_student.to(dtype)),
            index / index_deviation,
            self.s2t(ours.hidden.to(dtype)),
            self.t2s(values.to(dtype)),
            (ours.counts, theirs.counts),
            step.chunks if self.settings.causal else None,
        )

    def deviations(self, index: Tensor, target: Tensor, hidden: Tensor, counts: Tensor) -> list[Tensor]:
        """What keys, target embeddings and states of the teacher's rows are divided by, (m, 1) each."""
        return [deviation(values, counts, self.settings.deviation) for values in (index, target, hidden)]

    def _weight(self, to_student: Tensor, head, rows: Rows) -> Tensor:
        """(n,), the weight of each row in the student's space where it is correct."""
        wide = torch.promote_types(to_student.dtype, torch.float32)
        if not self.settings.renormalise:
            return torch.ones(len(to_student), dtype=wide, device=to_student.device)
        right = rows_over_vocabulary(correct, [(to_student, head)], [rows.targets]).bool()
        return mean_over(right, rows.counts, wide)


def _embedded(signal: Signal, ids: Tensor) -> Tensor:
    return signal.embed(ids).detach()
