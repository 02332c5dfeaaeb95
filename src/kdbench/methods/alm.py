"""Approximate likelihood matching: across tokenizers, by the probabilities of chunks of text."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdbench.losses import alm, chunks
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.vocabulary import of_tokens, rows_over_vocabulary
from kdbench.methods.base import Method, MethodSettings, Needs, Shape, require, require_signal
from kdbench.settings import Bool, Float
from kdbench.signals import Signal, Step, Terms, Vocabulary, weighted


class AlmSettings(MethodSettings):
    """Constants of the paper's main experiments (appendix A) and of the guide of its code (github.com/bminixhofer/tokenkit)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(
        1.0,
        description="weight of the cross entropy with the reference (published without GradMag: 1; pure distillation: 0)",
    )
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        1.0,
        description="weight of the chunks' divergence (published without GradMag: 1); its gradients are about 1 / temperature in size",
    )
    objective: Literal[*alm.OBJECTIVES, *alm.LIMITS] = Field(
        "forward_kl",
        description="divergence over two outcomes, the chunk and anything else; a limit is that of τ · divergence as the temperature τ → ∞",
    )
    temperature: Annotated[Float, Field(gt=0)] = Field(
        100.0,
        description="τ: the divergence compares p^(1/τ), so that long chunks count; unlike logits, log p is divided as a whole",
    )
    debias: Bool = Field(
        True,
        description="multiply a chunk's probability by that of a new word (or the end of text) after it, on both sides",
    )
    threshold: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="γ: a chunk after which the teacher gives a new word at most this probability is joined to the next one",
    )

    @model_validator(mode="after")
    def _options_are_read(self):
        fields = type(self).model_fields
        if self.objective in alm.LIMITS and self.temperature != fields["temperature"].default:
            raise ValueError(f"`temperature` is set but `objective` is {self.objective}, which has none")
        if not self.debias and self.threshold != fields["threshold"].default:
            raise ValueError("`threshold` is set but `debias` is false: only debiasing reads it")
        return self


class Alm(Method):
    """Approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083, sections 3 and 3.1).

    A chunk c is a piece of the response that ends with a token on both sides. With log p(c) = Σ over its rows of log p(target)
    (+ log P(a new word begins after it), where `debias` is set):

        ce_rate · CE(z_s, y) + kd_rate · Σ over sequences of n · mean over c of [f(p^(1/τ), q^(1/τ)) + f(1 - p^(1/τ), 1 - q^(1/τ))]

    p is the teacher's probability of c, q the student's, n the sequence's number of student rows.
    """

    version = 1
    across_tokenizers = True
    Settings = AlmSettings

    def __init__(
        self, settings: AlmSettings, student: Shape, teacher: Shape | None, vocabulary: Vocabulary | None = None
    ):
        super().__init__(settings, student, teacher)
        if settings.debias:
            require("alm", "the relation of the vocabularies", vocabulary)
            self.register_buffer("student_begins", vocabulary.student_begins_word, persistent=False)
            self.register_buffer("teacher_begins", vocabulary.teacher_begins_word, persistent=False)

    @classmethod
    def needs(cls, settings: AlmSettings) -> Needs:
        return Needs(teacher="signal", chunks=True, vocabulary=settings.debias)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("alm", teacher)
        require("alm", "chunks of rows", step.chunks)
        settings, rows = self.settings, student.rows
        ours, theirs = step.chunks
        ce, *q = self._student_rows(student)
        teacher_entropy, *p = self._teacher_rows(teacher)
        number = chunks.count(ours)
        owner = chunks.owners(ours, rows.sequence, number)
        if settings.debias:
            after_q = alm.begins_after(q[1], ours, number, rows.sequence)
            after_p = alm.begins_after(p[1], theirs, number, teacher.rows.sequence)
            merged, last = alm.merge(after_p, settings.threshold)
            ours, theirs, owner, number = merged[ours], merged[theirs], owner[last], int(last.sum())
        log_q, log_p = chunks.sums(q[0], ours, number), chunks.sums(p[0], theirs, number)
        if settings.debias:
            log_q, log_p = log_q + after_q[last], log_p + after_p[last]
        divergence = self._divergence(log_q, log_p)
        weight = chunks.mean_weights(owner, rows.counts, divergence.dtype)
        terms = weighted(
            {"ce": ce.sum(), "alm": (weight * divergence).sum()}, {"ce": settings.ce_rate, "alm": settings.kd_rate}
        )
        per_row = (rows.counts / teacher.rows.counts)[teacher.rows.sequence]
        terms.diagnostics["teacher_entropy"] = (per_row * teacher_entropy).sum()
        terms.diagnostics["aligned"] = chunks.alone(*step.chunks).sum()
        return terms

    def _student_rows(self, student: Signal) -> tuple[Tensor, ...]:
        """Of each row: cross entropy, log-probability of the target and, for debiasing, of any token that begins a word."""
        size, debias = student.head.size, self.settings.debias

        def row_function(logits, targets):
            found = [cross_entropy(logits, targets), alm.log_probability(of_tokens(logits, size), targets)]
            if debias:
                found.append(alm.log_probability_of_any(of_tokens(logits, size), self.student_begins))
            return torch.stack(found, dim=-1)

        rows = student.rows
        return rows_over_vocabulary(row_function, [(rows.hidden, student.head)], [rows.targets]).unbind(-1)

    def _teacher_rows(self, teacher: Signal) -> tuple[Tensor, ...]:
        """Of each row: entropy, and the same two."""
        debias = self.settings.debias

        def row_function(logits, targets):
            found = [entropy(logits), alm.log_probability(logits, targets)]
            if debias:
                found.append(alm.log_probability_of_any(logits, self.teacher_begins))
            return torch.stack(found, dim=-1)

        rows = teacher.rows
        head = [(rows.hidden.detach(), teacher.head.detach().of_tokens())]
        return rows_over_vocabulary(row_function, head, [rows.targets]).unbind(-1)

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        if self.settings.objective in alm.LIMITS:
            return alm.LIMITS[self.settings.objective](log_q, log_p)
        return alm.OBJECTIVES[self.settings.objective](log_q, log_p, self.settings.temperature)
