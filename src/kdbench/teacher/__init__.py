"""Where a teacher's side of a batch comes from: the running model, or its cache. Whoever asks cannot tell which."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from kdbench.data.batches import Side
    from kdbench.methods.base import Shape
    from kdbench.settings import Hardware
    from kdbench.signals import Head, Signal


class TeacherSource(Protocol):
    """Gives the teacher's signal for a batch."""

    def signal(self, rows: list[int], side: "Side", device) -> "Signal":
        """The teacher's side of a batch, without gradient.

        Args:
            rows: the records of the batch, as numbers in the tokenised data set, in the batch's order.
            side: the teacher's tensors of those records.
            device: where the signal is wanted.
        """
        ...

    def head(self, device) -> "Head":
        """The teacher's head, without gradient."""
        ...


def from_cache(cache, teacher, tokens_fingerprint: str) -> "tuple[Callable[[torch.device], TeacherSource], Shape]":
    """A teacher that is read from its cache; only the manifest of the teacher itself is looked at.

    Args:
        cache: the cache's folder.
        teacher: the teacher's folder.
        tokens_fingerprint: of the tokenised records to train on.

    Returns:
        A function of the device that gives the source, and the teacher's sizes.

    Raises:
        UserError: the cache is missing, damaged, or made from another teacher or other records.
    """
    from kdbench import files
    from kdbench.teacher.cached import Cached

    made_by = files.read_json(files.folder_of(teacher) / files.MANIFEST)["fingerprint"]
    source = Cached(cache, made_by, tokens_fingerprint)
    return (lambda device: source), source.shape


def from_model(teacher, hardware: "Hardware") -> "tuple[Callable[[torch.device], TeacherSource], Shape]":
    """A teacher that runs in every step; the same arguments and result as `from_cache` but for the cache."""
    from kdbench import models
    from kdbench.teacher.live import Live

    model, tokenizer = models.for_inference(teacher, hardware)
    models.check_head(model, tokenizer)

    def source(device) -> TeacherSource:
        live = Live(model.to(device), len(tokenizer))
        if hardware.compile:
            models.compile_body(model)
        return live

    return source, models.shape(model, tokenizer)
