"""What a loss may know: response rows, heads and embeddings of student and teacher. No models, batches, masks, files or ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The response positions of a batch, flattened over its sequences. Prompts and padding never get here.

    Attributes:
        hidden: (n, d) final hidden states, after the final norm: what the language model head reads.
        targets: (n,) int64, the token that each row has to predict; the last of a complete sequence is EOS.
        sequence: (n,) int64, which sequence of the batch a row belongs to; ascending.
        counts: (B,) int64, rows of each sequence; sums to n.
        inputs: (n,) int64, the token that each row has just read: of the first row the last one of the prompt, of every other the
            target of the row before.
    """

    hidden: Tensor
    targets: Tensor
    sequence: Tensor
    counts: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class Head:
    """A language model head: logits = hidden @ weight.T (+ bias).

    Attributes:
        weight: (V, d); V may be padded beyond the tokenizer's real size.
        size: number of tokens of the tokenizer, at most V.
        bias: (V,) or None.
    """

    weight: Tensor
    size: int
    bias: Tensor | None = None

    def detach(self) -> "Head":
        """The same head for a loss that must not train it."""
        return Head(self.weight.detach(), self.size, None if self.bias is None else self.bias.detach())

    def of_tokens(self) -> "Head":
        """The same head without rows beyond the tokenizer's tokens; nothing is copied."""
        if self.weight.shape[0] == self.size:
            return self
        return Head(self.weight[: self.size], self.size, None if self.bias is None else self.bias[: self.size])


@dataclass(frozen=True)
class Signal:
    """One model's side of a batch. A teacher's looks the same whether the model ran just now or its states come from the cache.

    Attributes:
        rows: its response rows.
        head: its head.
        embed: ids (...,) int64 -> input embeddings (..., d_embedding).
    """

    rows: Rows
    head: Head
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """How the tokens of a teacher's tokenizer relate to those of a student's, from their texts alone.

    Attributes:
        nearest: (V_t,) int64, for each teacher's token the student's token of the same text (markers of a word's start are no part of
            it), else one of minimum edit distance.
        distance: (V_t,) int64, that edit distance; 0 for the same text.
        shared: (k, 2) int64, ids of student and teacher of the tokens that stand for the same bytes; the two ends of text are such a pair.
            Ascending in the first, no id twice.
        student_begins_word: (V_s,) bool, tokens whose bytes begin with white space, and the end of text.
        teacher_begins_word: (V_t,) bool, the same for the teacher.
    """

    nearest: Tensor
    distance: Tensor
    shared: Tensor
    student_begins_word: Tensor
    teacher_begins_word: Tensor


@dataclass(frozen=True)
class Step:
    """What a method may know of the moment besides the two signals.

    Attributes:
        progress: share of the training that is done, 0 at the first step, 1 after the last.
        pairs: (p, 2) int64, rows of the student paired with rows of the teacher by the alignment the method asked for, or None.
        chunks: (n,) and (m,) int64, for each row of the student and of the teacher the chunk of text that its target belongs to, or None.
            Chunks are the shortest pieces of a response that end with a token on both sides. They are counted over the batch from 0, in
            order; each has at least one row on either side.
        spelling: (B, N, M) float32, edit distance of the texts of the tokens that a row i of the student and a row j of the teacher
            have just read (`inputs`), divided by the longer one's length: 0 for the same text, at most 1. Padded with 0 beyond a
            sequence's rows. Or None.
    """

    progress: float = 0.0
    pairs: Tensor | None = None
    chunks: tuple[Tensor, Tensor] | None = None
    spelling: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """A loss as sums over response tokens; the training loop divides once by the number of response tokens of the global batch.

    Attributes:
        total: scalar with gradient, the weighted sum of the terms.
        sums: each term by name, unweighted, detached.
        diagnostics: further sums to log (not part of the loss), detached.
    """

    total: Tensor
    sums: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "Terms") -> "Terms":
        if self.sums.keys() & other.sums.keys():
            raise ValueError(f"two terms of one name: {sorted(self.sums.keys() & other.sums.keys())}")
        return Terms(self.total + other.total, self.sums | other.sums, self.diagnostics | other.diagnostics)


def weighted(sums: dict[str, Tensor], weights: dict[str, float]) -> Terms:
    """Terms from plain differentiable sums and their weights (1 where none is given)."""
    total = torch.stack([weights.get(name, 1.0) * value for name, value in sums.items()]).sum()
    return Terms(total, {name: value.detach() for name, value in sums.items()})
