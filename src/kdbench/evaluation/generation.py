"""Answers of a model to the prompts of records, by whichever backend writes them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from kdbench import models
from kdbench.data.records import Record, clean_output
from kdbench.data.text import encode, fit_prompts, full_prompt
from kdbench.errors import UserError
from kdbench.evaluation.predictions import Prediction
from kdbench.settings import Decoding, Hardware, Text


class Writer(Protocol):
    """What lets a model write: `decoding.BatchWriter` or `vllm.VllmWriter`.

    Attributes:
        tokenizer: of the model.
        positions: how many tokens the model can read and write, or None where there is no limit.
    """

    tokenizer: object
    positions: int | None

    def write(
        self,
        prompts: Sequence[list[int]],
        names: Sequence[str],
        decoding: Decoding,
        seeds: Sequence[int],
        done: Callable[[], None],
    ) -> list[list[list[int]]]:
        """For each prompt and seed the new tokens, up to and with the end of text; `done` is called when those of a prompt are written."""


def load(folder, hardware: Hardware, decoding: Decoding, text: Text) -> Writer:
    """A model that is ready to write.

    Args:
        folder: the model, or its manifest; both are checked.
        hardware: GPUs, threads, and how many answers are written at a time.
        decoding: backend and precision.
        text: length of prompts.

    Raises:
        UserError: the model is missing, damaged or cannot be loaded; the backend is not installed.
    """
    if decoding.backend == "vllm":
        from kdbench.evaluation.vllm import VllmWriter

        return VllmWriter(folder, decoding, text.max_prompt_tokens, hardware.generation_batch_size)
    from kdbench.evaluation.decoding import BatchWriter

    models.quiet()
    return BatchWriter(*models.for_inference(folder, hardware, decoding.precision), hardware.generation_batch_size)


def generate(
    writer: Writer,
    records: Sequence[Record],
    decoding: Decoding,
    text: Text,
    seeds: Sequence[int],
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[int, list[Prediction]]:
    """Answer the prompts of some records, in their order, once with each decode seed.

    An answer depends on the model, its prompt and the seed alone: what is sampled at a position is decided by a number drawn from (seed,
    record, position), so neither the other records nor the other seeds nor the number of answers written at a time matter, nor whether a
    GPU writes them, but for the rounding of logits. (vLLM draws from (seed, record) in its own way.) Rows of the head beyond the
    tokenizer's tokens are no words, and are never chosen.

    Args:
        writer: the model.
        records: what to answer.
        decoding: how.
        text: template and length of prompts; too long a prompt is cut as text and keeps its response marker.
        seeds: decode seeds; greedy decoding does not read them.
        progress: wraps an iteration over the records that are answered.

    Raises:
        UserError: the model has too few positions for a prompt and an answer.
    """
    prompts = fit_prompts(records, [writer.tokenizer], text)
    ids = encode(writer.tokenizer, prompts)["input_ids"]
    longest = max(map(len, ids))
    if writer.positions is not None and longest + decoding.max_new_tokens > writer.positions:
        raise UserError(
            f"the model has {writer.positions} positions, the longest prompt {longest} tokens, and evaluation.max_new_tokens is"
            f" {decoding.max_new_tokens}: lower the latter or text.max_prompt_tokens"
        )
    steps = iter(progress(range(len(records))))
    next(steps)  # a bar shows an item as done when the next is asked for
    written = writer.write(ids, [record.id for record in records], decoding, seeds, lambda: next(steps, None))
    return {
        seed: [
            _prediction(record, prompt, tokens[index], writer.tokenizer, text)
            for record, prompt, tokens in zip(records, prompts, written, strict=True)
        ]
        for index, seed in enumerate(seeds)
    }


def _prediction(record: Record, prompt: str, tokens: list[int], tokenizer, text: Text) -> Prediction:
    return Prediction(
        id=record.id,
        prompt=prompt,
        prompt_cut=prompt != full_prompt(record, text.template),
        prediction=tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        references=list(record.outputs),
        tokens=len(tokens),
        stop="eos" if tokens[-1] == tokenizer.eos_token_id else "length",
    )


def answers(
    writer: Writer,
    records: Sequence[Record],
    decoding: Decoding,
    text: Text,
    seed: int,
    progress: Callable[[Sequence], Iterable] = iter,
) -> tuple[list[Record], int]:
    """The records with a model's answers in the place of their references; those it left empty are dropped, and counted.

    Args:
        writer, records, decoding, text, progress: see `generate`.
        seed: decode seed.

    Raises:
        UserError: all answers are empty.
    """
    written = generate(writer, records, decoding, text, [seed], progress)[seed]
    texts = [clean_output(answer.prediction) for answer in written]
    kept = [replace(record, outputs=(text,)) for record, text in zip(records, texts, strict=True) if text]
    if not kept:
        raise UserError("the teacher answers none of the training prompts: its answers are empty")
    return kept, len(records) - len(kept)
