"""General online logit distillation on given responses: ULD on chunks of text, exact on the tokens that both vocabularies have."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdbench.losses import chunks, gold
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.gold import Group
from kdbench.losses.vocabulary import over_vocabulary, rows_over_vocabulary
from kdbench.methods.base import Method, MethodSettings, Needs, Shape, require, require_signal
from kdbench.settings import Bool, Float
from kdbench.signals import Signal, Step, Terms, Vocabulary


class GoldSettings(MethodSettings):
    """Constants of trl.experimental.gold (GOLDConfig) with its hybrid loss."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(
        0.0, description="weight of the cross entropy with the reference (published uld_crossentropy_weight: 0)"
    )
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="weight of the distillation terms (published uld_distillation_weight: 1)"
    )
    matched_weight: Annotated[Float, Field(ge=0)] | None = Field(
        None,
        description="weight of the tokens of both vocabularies within that; by default their share of the teacher's vocabulary (published)",
    )
    unmatched_weight: Annotated[Float, Field(ge=0)] | None = Field(
        None, description="weight of the other tokens; by default 1 minus that share (published)"
    )
    beta: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.5, description="of the generalised Jensen-Shannon divergence: 0 is KL(p ‖ q), 1 is KL(q ‖ p)"
    )
    student_temperature: Annotated[Float, Field(gt=0)] = Field(1.0, description="divides the student's logits")
    teacher_temperature: Annotated[Float, Field(gt=0)] = Field(1.0, description="divides the teacher's logits")
    merge: Literal["observed", "bayesian"] = Field(
        "observed",
        description="row whose distribution stands for a chunk, times the other rows' probabilities: the first (published) or the last",
    )
    rows: Literal["target", "input"] = Field(
        "target",
        description="rows of a chunk: those that predict its tokens, or that have just read them (published code with `observed`)",
    )
    skip_end: Bool = Field(
        True, description="leave out the last chunk of a response, the end of text (published uld_skip_*_eos)"
    )

    @model_validator(mode="after")
    def _weights_and_rows_fit(self):
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError("set `matched_weight` and `unmatched_weight`, or neither")
        if self.rows == "input" and not self.skip_end:
            raise ValueError("`skip_end: false` needs `rows: target`: no row has read the end of text")
        return self


class Gold(Method):
    """The hybrid ULD loss of GOLD (Patiño et al. 2025, Hugging Face; trl.experimental.gold), on the references.

    A chunk is a piece of the response that ends with a token on both sides. With q = c_s softmax(z_s), p = c_t softmax(z_t) of one row of
    the chunk on either side, c the product of the probabilities of its tokens at the chunk's other rows, S the tokens of both vocabularies:

        ce_rate · CE(z_s, y) + kd_rate · Σ over sequences of n · mean over chunks of
            [w JSD_β(p, q over S) + (1-w) Σ_k |q_(k) - p_(k)| over the other tokens, sorted],   w = |S| / V_t
    """

    version = 1
    across_tokenizers = True
    Settings = GoldSettings

    def __init__(
        self, settings: GoldSettings, student: Shape, teacher: Shape | None, vocabulary: Vocabulary | None = None
    ):
        super().__init__(settings, student, teacher)
        require_signal("gold", teacher)
        require("gold", "the relation of the vocabularies", vocabulary)
        for name, ids, size in zip(
            ("student", "teacher"), vocabulary.shared.unbind(1), (student.vocabulary, teacher.vocabulary), strict=True
        ):
            others = torch.ones(size, dtype=torch.bool, device=ids.device).index_fill(0, ids, False)
            self.register_buffer(f"{name}_shared", ids, persistent=False)
            self.register_buffer(f"{name}_rest", others.nonzero().squeeze(1), persistent=False)
        share = len(vocabulary.shared) / teacher.vocabulary
        adaptive = settings.matched_weight is None
        self._weights = {
            "ce": settings.ce_rate,
            "matched": settings.kd_rate * (share if adaptive else settings.matched_weight),
            "unmatched": settings.kd_rate * (1 - share if adaptive else settings.unmatched_weight),
        }

    @classmethod
    def needs(cls, settings: GoldSettings) -> Needs:
        return Needs(teacher="signal", chunks=True, vocabulary=True)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("gold", teacher)
        require("gold", "chunks of rows", step.chunks)
        settings, rows = self.settings, student.rows
        temperatures = settings.student_temperature, settings.teacher_temperature
        hidden, head = teacher.rows.hidden.detach(), teacher.head.detach().of_tokens()
        ours, theirs = gold.groups(
            rows, teacher.rows, step.chunks, settings.merge, settings.rows, skip_last=settings.skip_end
        )
        owner = rows.sequence[ours.base]
        log_q = _log_factors(rows.hidden, student.head.of_tokens(), ours, temperatures[0])
        log_p = _log_factors(hidden, head, theirs, temperatures[1])
        weight = chunks.mean_weights(owner, rows.counts, log_q.dtype)

        def row_loss(z_s, z_t, weight, log_p, log_q):
            losses = gold.hybrid(
                z_s / temperatures[0],
                z_t / temperatures[1],
                (log_q, log_p),
                (self.student_shared, self.teacher_shared),
                (self.student_rest, self.teacher_rest),
                settings.beta,
            )
            return {name: weight * loss for name, loss in losses.items()}

        reference = over_vocabulary(
            lambda logits, targets: {"ce": cross_entropy(logits, targets)},
            [(rows.hidden, student.head)],
            [rows.targets],
            weights=self._weights,
        )
        compared = over_vocabulary(
            row_loss,
            [(rows.hidden[ours.base], student.head.of_tokens()), (hidden[theirs.base], head)],
            [weight, log_p],
            weights=self._weights,
            differentiable_rows=[log_q],
        )
        terms = reference + compared
        terms.diagnostics["aligned"] = chunks.alone(*step.chunks).sum()
        return terms


def _log_factors(hidden: Tensor, head, group: Group, temperature: float) -> Tensor:
    """(C,) log of the product of the probabilities of the tokens at the rows of a chunk other than its base."""
    log_p = rows_over_vocabulary(
        lambda logits, tokens: -cross_entropy(logits / temperature, tokens),
        [(hidden[group.others], head)],
        [group.tokens],
    )
    return chunks.sums(log_p, group.chunks, len(group.base))
