"""MinED: across tokenizers, by moving the teacher's logits into the student's vocabulary."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.mined import first_of_preimage, first_preimage, largest_of_preimage, one_hot_divergence
from kdbench.losses.vocabulary import of_tokens, over_vocabulary
from kdbench.methods.base import DivergenceSettings, Method, Needs, Shape, require, require_signal
from kdbench.settings import Float
from kdbench.signals import Signal, Step, Terms, Vocabulary


class MinedSettings(DivergenceSettings):
    """Constants of the published scripts of DSKD (arXiv 2406.17328) for its MinED baseline."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(0.5, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        0.5, description="weight of the divergence from the teacher and of its stand-in on rows without one"
    )
    preimage: Literal["max", "first"] = Field(
        "max",
        description="which logit a student's token takes of the teacher's tokens that are nearest to it: the largest (FuseLLM), "
        "or that of the lowest id (the port in DSKD)",
    )
    unaligned: Literal["one_hot", "skip"] = Field(
        "one_hot",
        description="rows without a teacher's: learn the reference at `temperature`, a second cross entropy (published), or nothing",
    )


class Mined(Method):
    """Minimum-edit-distance alignment (FuseLLM, Wan et al. 2024, arXiv 2401.10491, section 3).

    A student's row i is aligned where it is paired with a teacher's row j and the token that i has just read is the nearest one to what j
    has just read. There z̃_j holds, for each of the student's tokens, the largest of the logits z_t of the teacher's tokens nearest to it:

        ce_rate · CE(z_s, y) + kd_rate · (Σ over aligned rows of D(z_s, z̃_j) + Σ over the others of CE(z_s / T, y))

    The last sum is the divergence from the one-hot distribution of y, whatever the objective.
    """

    version = 1
    across_tokenizers = True
    Settings = MinedSettings

    def __init__(
        self, settings: MinedSettings, student: Shape, teacher: Shape | None, vocabulary: Vocabulary | None = None
    ):
        super().__init__(settings, student, teacher)
        require("mined", "the relation of the two vocabularies", vocabulary)
        self.register_buffer("nearest", vocabulary.nearest, persistent=False)
        if settings.preimage == "first":
            first = first_preimage(vocabulary.nearest, student.vocabulary)
            self.register_buffer("first", first, persistent=False)

    @classmethod
    def needs(cls, settings: MinedSettings) -> Needs:
        return Needs(teacher="signal", alignment="dtw", vocabulary=True)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("mined", teacher)
        require("mined", "pairs of rows", step.pairs)
        settings, size = self.settings, student.head.size
        hidden, targets = student.rows.hidden, student.rows.targets
        ours, theirs = step.pairs.unbind(1)
        same = student.rows.inputs[ours] == self.nearest[teacher.rows.inputs[theirs]]
        ours, theirs = step.pairs[same].unbind(1)

        def learn_reference(logits, targets):
            if settings.unaligned == "skip":
                return {}
            loss = one_hot_divergence(of_tokens(logits, size), targets, settings.temperature)
            return {"one_hot": loss * settings.temperature**2 if settings.squared_temperature else loss}

        def of_aligned(logits, teacher_logits, targets):
            moved = self._moved(teacher_logits, size)
            return {
                "ce": cross_entropy(logits, targets),
                "kd": settings.divergence(of_tokens(logits, size), moved),
                "teacher_correct": correct(moved, targets),
                "teacher_entropy": entropy(moved),
            }

        def of_others(logits, targets):
            return {"ce": cross_entropy(logits, targets), **learn_reference(logits, targets)}

        rest = _others(ours, len(hidden))
        weights = {"ce": settings.ce_rate, "kd": settings.kd_rate, "one_hot": settings.kd_rate}
        teacher_head = teacher.head.detach().of_tokens()
        heads = [(hidden[ours], student.head), (teacher.rows.hidden.detach()[theirs], teacher_head)]
        diagnostics = ["teacher_correct", "teacher_entropy"]
        aligned = over_vocabulary(of_aligned, heads, [targets[ours]], weights, diagnostics)
        others = over_vocabulary(of_others, [(hidden[rest], student.head)], [targets[rest]], weights)
        sums = aligned.sums | others.sums | {"ce": aligned.sums["ce"] + others.sums["ce"]}
        counted = aligned.diagnostics | {"aligned": torch.ones_like(ours).sum()}
        return Terms(aligned.total + others.total, sums, counted)

    def _moved(self, logits, size):
        """(r, V_t) logits of the teacher -> (r, V_s)."""
        if self.settings.preimage == "first":
            return first_of_preimage(logits, self.first)
        return largest_of_preimage(logits, self.nearest, size)


def _others(chosen, count):
    """The rows that are not among the chosen ones, ascending."""
    taken = torch.zeros(count, dtype=torch.int8, device=chosen.device).index_fill(0, chosen, 1)
    return taken.argsort(stable=True)[: count - len(chosen)]
