"""Multi-level optimal transport: across tokenizers, by ranked probabilities at paired positions and between all positions."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdbench.losses import multilevel_ot as losses
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.divergences import entropy
from kdbench.losses.ot import sinkhorn
from kdbench.losses.sequences import pad
from kdbench.losses.vocabulary import of_tokens, rows_over_vocabulary
from kdbench.methods.base import Method, MethodSettings, Needs, require, require_signal
from kdbench.settings import Bool, Float, Int
from kdbench.signals import Head, Rows, Signal, Step, Terms, weighted


class MultilevelOtSettings(MethodSettings):
    """Constants of the paper (arXiv 2412.14528, experimental settings)."""

    ce_rate: Annotated[Float, Field(ge=0)] = Field(1.0, description="weight of the cross entropy with the reference")
    kd_rate: Annotated[Float, Field(ge=0)] = Field(0.15, description="weight of the three transport terms together")
    sl_weight: Annotated[Float, Field(ge=0)] = Field(
        0.1, description="weight of the logarithmic loss beside the absolute difference"
    )
    sd_weight: Annotated[Float, Field(ge=0)] = Field(
        0.1, description="weight of the Sinkhorn distance between sequences beside the absolute difference"
    )
    top_k: Annotated[Int, Field(ge=1)] = Field(50, description="tokens that are kept of either vocabulary")
    token_temperature: Annotated[Float, Field(gt=0)] = Field(
        1.0, description="divides the logits of both sides in the absolute difference and the logarithmic loss"
    )
    sequence_temperature: Annotated[Float, Field(gt=0)] = Field(
        2.0, description="divides the logits of both sides in the Sinkhorn distance"
    )
    sinkhorn_lambda: Annotated[Float, Field(gt=0)] = Field(
        0.1, description="entropic regularisation, in units of the cost (which is between 0 and 2)"
    )
    sinkhorn_iterations: Annotated[Int, Field(ge=1)] = Field(20, description="updates of rows and columns of the plan")
    unrolled: Bool = Field(
        True,
        description="gradient of the Sinkhorn distance through its iterations (published), or with the plan held fixed",
    )
    normalize_logits: Bool = Field(
        False,
        description="divide the logits of a row by their standard deviation before the softmax: the authors' code does, their paper not",
    )
    alignment: Literal["index", "byte"] = Field(
        "index",
        description="which response tokens are paired: the k-th with the k-th (published), or those that cover the same bytes",
    )


class MultilevelOt(Method):
    """Multi-level optimal transport (Cui et al. 2024, arXiv 2412.14528, eq. 10-22).

    In every sequence either vocabulary is ranked by its logits summed over the response, and the top k are kept. With s_i and t_j (k,) the
    probabilities of these at rows i and j, the softmax taken over the whole vocabulary:

        ce_rate · CE(z_s, y) + kd_rate · (L_HAD + sl_weight · L_SL + sd_weight · L_SD)
        L_HAD = Σ over pairs (i, j) of Σ_r |t_jr - s_ir|,   L_SL = -Σ over pairs (i, j) of Σ_r t_jr log s_ir,
        L_SD = Σ over sequences of n ⟨P, C⟩,   C_ij = Σ_r |s_ir - t_jr|

    P is the Sinkhorn plan of C with uniform marginals, n the sequence's rows of the student. The rank is a constant.
    """

    version = 1
    across_tokenizers = True
    Settings = MultilevelOtSettings

    @classmethod
    def needs(cls, settings: MultilevelOtSettings) -> Needs:
        return Needs(teacher="signal", alignment=settings.alignment)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("multilevel_ot", teacher)
        require("multilevel_ot", "pairs of rows", step.pairs)
        settings = self.settings
        counts, teacher_counts = student.rows.counts, teacher.rows.counts
        k = min(settings.top_k, student.head.size, teacher.head.size)
        ce, log_s, log_s_sequence = self._student(student, k)
        entropies, t, t_sequence = self._teacher(teacher, k)

        ours, theirs = step.pairs.unbind(1)
        cost = losses.transport_cost(pad(log_s_sequence.exp(), counts), pad(t_sequence, teacher_counts))
        transport = sinkhorn(
            cost,
            counts,
            teacher_counts,
            epsilon=settings.sinkhorn_lambda,
            relative=False,
            iterations=settings.sinkhorn_iterations,
            tolerance=0.0,
            rows_first=True,
            unrolled=settings.unrolled,
        )
        sums = {
            "ce": ce.sum(),
            "had": losses.absolute_difference(log_s[ours].exp(), t[theirs]).sum(),
            "sl": losses.log_loss(log_s[ours], t[theirs]).sum(),
            "sd": (counts * transport.value).sum(),
        }
        weights = {"ce": settings.ce_rate, "had": settings.kd_rate}
        weights["sl"] = settings.kd_rate * settings.sl_weight
        weights["sd"] = settings.kd_rate * settings.sd_weight
        terms = weighted(sums, weights)

        def as_sum(of_sequences):
            return (counts * of_sequences).sum()

        diagnostics = {
            "aligned": ce.new_tensor(float(len(ours))),
            "teacher_entropy": as_sum(losses.sequence_means(entropies, teacher_counts)),
            "teacher_mass": as_sum(losses.sequence_means(t.sum(-1), teacher_counts)),
            "marginal_error": as_sum(transport.error),
        }
        return Terms(terms.total, terms.sums, diagnostics)

    def _student(self, signal, k):
        """Cross entropy (n,), and log-probabilities (n, k) of the top tokens at the temperatures of tokens and of sequences."""
        rows, head = signal.rows, signal.head
        tokens = _top_tokens(rows, head, k)[rows.sequence]

        def of_rows(logits, targets, tokens):
            reference = cross_entropy(logits, targets)
            return torch.cat(
                [reference[:, None], *self._log_probabilities(of_tokens(logits, head.size), tokens)], dim=1
            )

        found = rows_over_vocabulary(of_rows, [(rows.hidden, head)], [rows.targets, tokens])
        ce, log_s, log_s_sequence = found.split([1, k, k], dim=1)
        return ce[:, 0], log_s, log_s_sequence

    def _teacher(self, signal, k):
        """Entropy (m,), and probabilities (m, k) of the top tokens at the two temperatures; without gradient."""
        rows, head = signal.rows, signal.head.detach().of_tokens()
        tokens = _top_tokens(rows, head, k)[rows.sequence]

        def of_rows(logits, tokens):
            return torch.cat([entropy(logits)[:, None], *self._log_probabilities(logits, tokens)], dim=1)

        found = rows_over_vocabulary(of_rows, [(rows.hidden.detach(), head)], [tokens])
        entropies, log_t, log_t_sequence = found.split([1, k, k], dim=1)
        return entropies[:, 0], log_t.exp(), log_t_sequence.exp()

    def _log_probabilities(self, logits, tokens):
        settings = self.settings
        if settings.normalize_logits:
            logits = losses.by_deviation(logits)
        temperatures = settings.token_temperature, settings.sequence_temperature
        return [losses.log_probabilities_of(logits, tokens, temperature) for temperature in temperatures]


def _top_tokens(rows: Rows, head: Head, k: int) -> Tensor:
    """(B, k) int64, the tokens that rank highest in each sequence; it takes the logits of one row for each."""
    with torch.no_grad():
        mean = losses.sequence_means(rows.hidden, rows.counts)
        return rows_over_vocabulary(lambda logits: losses.top_tokens(logits, k), [(mean, head.of_tokens())])
