"""All that one training needs to know, whoever asks for it: the workflow's script, a test, a notebook."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.settings import Hardware, Training

if TYPE_CHECKING:
    import torch

    from kdbench.alignment.pairs import Alignment
    from kdbench.alignment.spelling import Spelling
    from kdbench.data.tokens import Tokens
    from kdbench.methods.base import Shape
    from kdbench.signals import Vocabulary
    from kdbench.teacher import TeacherSource


@dataclass(frozen=True)
class Job:
    """One training: a student, what it reads, a method, and where the result goes.

    Attributes:
        output: the run's folder.
        identity: what decides the numbers, as JSON holds it; with the seed it names the run's checkpoints.
        seed: of the order of the data, of dropout and of what is initialised.
        training: rates, epochs, precision, adapters.
        hardware: where and how fast; changes no result beyond round-off.
        student: folder of the model to train, in Hugging Face format.
        train: tokenised records to learn from; those of the dev loss are `dev`.
        method: name in the registry of methods, with its settings.
        alignment: pairs and chunks of response tokens of `train`, where the method asks for "byte" or for chunks.
        spelling: edit distances and warping paths of `train`, where the method asks for "dtw" or for the spelling.
        vocabulary: relation of the two vocabularies, where the method asks for it.
        teacher: makes the source of the teacher's signal on a device, where the method asks for one; called once in each process.
        teacher_shape: the teacher's sizes, for the method's projectors.
        trust_remote_code: run Python code that comes with the student.
    """

    output: Path
    identity: dict
    seed: int
    training: Training
    hardware: Hardware
    student: Path
    train: "Tokens"
    dev: "Tokens"
    method: str = "sft"
    method_settings: dict = field(default_factory=dict)
    alignment: "Alignment | None" = None
    spelling: "Spelling | None" = None
    vocabulary: "Vocabulary | None" = None
    teacher: "Callable[[torch.device], TeacherSource] | None" = None
    teacher_shape: "Shape | None" = None
    trust_remote_code: bool = False
