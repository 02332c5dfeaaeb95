"""What a method is: settings, what it needs of the workflow, what it learns, and its loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.losses.divergences import OBJECTIVES, OPTIONS
from kdbench.settings import Bool, Float
from kdbench.signals import Head, Signal, Step, Terms, Vocabulary


class MethodSettings(BaseModel):
    """Settings of a method: every field with a default, a description and, where it has one, a unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DivergenceSettings(MethodSettings):
    """Settings of a method that compares two distributions of one vocabulary."""

    objective: Literal[*OBJECTIVES] = Field(
        "forward_kl", description="divergence of the student's distribution from the teacher's"
    )
    temperature: Annotated[Float, Field(gt=0)] = Field(
        2.0, description="divides the logits of both sides in a divergence"
    )
    squared_temperature: Bool = Field(
        False,
        description="multiply divergences by temperature², which keeps gradients on one scale over temperatures; published: no",
    )
    skew_lambda: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the first distribution in the mixture, for the skewed objectives"
    )
    adaptive_alpha: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.5, description="cumulative teacher probability below which tokens are its tail, for adaptive_kl"
    )

    @model_validator(mode="after")
    def _options_belong_to_the_objective(self):
        for option in {option for options in OPTIONS.values() for option in options} - set(
            OPTIONS.get(self.objective, ())
        ):
            if getattr(self, option) != type(self).model_fields[option].default:
                readers = [name for name, options in OPTIONS.items() if option in options]
                raise ValueError(
                    f"`{option}` is set but `objective` is {self.objective}: only {' and '.join(readers)} read it"
                )
        return self

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor, objective: str | None = None) -> Tensor:
        """The objective, or another one at the same temperature, per row: (r, V) and (r, V) -> (r,) nats."""
        name = objective or self.objective
        options = {option: getattr(self, option) for option in OPTIONS.get(name, ())}
        loss = OBJECTIVES[name](student_logits, teacher_logits, self.temperature, **options)
        return loss * self.temperature**2 if self.squared_temperature else loss


@dataclass(frozen=True)
class Needs:
    """What the workflow has to prepare before a method can train.

    Attributes:
        teacher: "none"; "answers": the student learns from texts that the teacher wrote; "signal": from its hidden states.
        alignment: which relation of student and teacher tokens the method pairs rows by (`Step.pairs`). "index": the k-th with the k-th.
            "byte": targets that cover the same bytes. "dtw": the rows of a student each of which dynamic time warping over the edit
            distances of the tokens just read aligns with exactly one row of the teacher, with that row.
        chunks: whether it asks for `Step.chunks`.
        spelling: whether it asks for `Step.spelling`.
        vocabulary: whether it asks for the relation of the two vocabularies.
    """

    teacher: Literal["none", "answers", "signal"] = "none"
    alignment: Literal["none", "index", "byte", "dtw"] = "none"
    chunks: bool = False
    spelling: bool = False
    vocabulary: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that a method builds its projectors from.

    Attributes:
        hidden: width of the final hidden state.
        embedding: width of the input embeddings.
        vocabulary: number of tokens of its tokenizer.
    """

    hidden: int
    embedding: int
    vocabulary: int


class Method(nn.Module, ABC):
    """A distillation method. Its parameters are what it learns besides the student (projectors); they train at their own rate.

    A subclass stands in `kdbench/methods/<name>.py`, under the name that configurations use. It raises `version` whenever its numbers
    change: then, and only then, are its runs made anew.
    """

    version: ClassVar[int] = 1
    across_tokenizers: ClassVar[bool] = False
    Settings: ClassVar[type[MethodSettings]] = MethodSettings

    def __init__(
        self, settings: MethodSettings, student: Shape, teacher: Shape | None, vocabulary: Vocabulary | None = None
    ):
        super().__init__()
        self.settings = settings

    @classmethod
    def needs(cls, settings: MethodSettings) -> Needs:
        """What these settings ask of the workflow."""
        return Needs()

    @abstractmethod
    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        """The loss of a batch, as sums over its response tokens. `teacher` is None where `needs` asks for no signal."""

    def initialize(self, student: Head, teacher: Head) -> None:
        """Set what starts from the models' heads; called on the device at the start of every attempt, with the untrained student's.

        Parameters set here are those of a training that starts from nothing: one that resumes overwrites them from its checkpoint.
        """

    def observe(self, sums: dict[str, float], tokens: int, step: int) -> dict[str, float]:
        """Look at a step that is done, the same numbers in every process: for what a method adapts without gradient.

        Args:
            sums: terms and diagnostics by name, summed over the global batch.
            tokens: response tokens of the student in it.
            step: optimizer steps done, this one included.

        Returns:
            What to write into the step's metrics, by name.
        """
        return {}

    def state(self) -> dict:
        """What `observe` has changed, as JSON holds it: part of every checkpoint."""
        return {}

    def restore(self, state: dict) -> None:
        """Go on from what `state` gave."""


def require_same_tokens(method: str, student: Signal, teacher: Signal | None) -> None:
    """Make sure that row i of the student and row i of the teacher predict the same token of the same vocabulary.

    Raises:
        UserError: they do not; names the methods that work across tokenizers.
    """
    require_signal(method, teacher)
    ours, theirs = student.rows, teacher.rows
    if student.head.size != teacher.head.size:
        reason = f"the student's tokenizer has {student.head.size} tokens, the teacher's {teacher.head.size}"
    elif not torch.equal(ours.counts, theirs.counts):
        reason = "student and teacher split the responses of a batch into different numbers of tokens"
    elif not torch.equal(ours.targets, theirs.targets):
        reason = "student and teacher split the responses of a batch into different tokens"
    else:
        return
    from kdbench.methods import get, names

    others = [name for name in names() if get(name).across_tokenizers and name != "sft"]
    raise UserError(
        f"method {method} needs one tokenizer for both models, but {reason}; across tokenizers work: {', '.join(others)}"
    )


def require_signal(method: str, teacher: Signal | None) -> None:
    """Raises ValueError where the training loop hands no teacher to a method that asked for one."""
    require(method, "a teacher's signal", teacher)


def require(method: str, what: str, given) -> None:
    """Raises ValueError where a method does not get what its `needs` ask for."""
    if given is None:
        raise ValueError(f"method {method} asks for {what} and got none")
