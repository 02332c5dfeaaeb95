"""From records to text: the prompt template, and cuts that make a text fit every tokenizer that will read it.

Texts are cut, never token sequences: then a student and a teacher with different tokenizers read the same bytes. Prompt and response
are tokenised separately, without special tokens, and special tokens that a user spelled out are read as plain text.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kdbench.data.records import Record
from kdbench.errors import UserError
from kdbench.settings import Text

_ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_CHUNK = 1024  # texts that are tokenised together
_JOINER = "\u200d"  # makes one character of two emoji


class Fitted(NamedTuple):
    """A record's text within the limits.

    Attributes:
        prompt: in its template.
        response: the first reference.
        complete: the response is whole, so an end-of-text token follows it.
    """

    prompt: str
    response: str
    complete: bool


def prompt(instruction: str, input: str, template: str) -> str:
    """The prompt of an instruction, ending with the response marker and a newline.

    Args:
        instruction: what to do.
        input: what to do it with; its section is left out where it is empty.
        template: "alpaca", the template of Stanford Alpaca (2023) that the published results use, or "short", without its opening.
    """
    opening = {"alpaca": _PAIRED if input else _ALONE, "short": ""}[template]
    section = f"\n\n### Input:\n{input}" if input else ""
    return f"{opening}### Instruction:\n{instruction}{section}\n\n### Response:\n"


def full_prompt(record: Record, template: str) -> str:
    """A record's prompt before any cut."""
    return prompt(record.instruction, record.input, template) if record.prompt is None else record.prompt


def encode(tokenizer, texts: Sequence[str], **options):
    """Token ids of texts by the one convention of this project: no special token is added, none is recognised in the text.

    Returns:
        What the tokenizer returns: `["input_ids"]` is a list of lists of ids.
    """
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


class Once:
    """A tokenizer that reads no text twice: for `encode` without further options. It forgets nothing, so it is for few texts at a time."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str], **options) -> dict[str, list[list[int]]]:
        new = list({text: None for text in texts if text not in self._known})
        if new:
            self._known |= zip(new, self._tokenizer(new, **options)["input_ids"], strict=True)
        return {"input_ids": [self._known[text] for text in texts]}


def fit(record: Record, tokenizers: Sequence, text: Text) -> Fitted:
    """`fit_all` for one record."""
    return fit_all([record], tokenizers, text)[0]


def fit_all(records: Sequence[Record], tokenizers: Sequence, text: Text) -> list[Fitted]:
    """Prompt and first reference of each record, cut so that they fit the limits of `text` in every tokenizer.

    A prompt loses the end of its input, then that of its instruction; the response marker stays. A prompt without a template loses its
    beginning. A response loses its end, and then gets no end-of-text token.

    Raises:
        UserError: the limits leave no room for anything of a record's prompt or response.
    """
    prompts = fit_prompts(records, tokenizers, text)
    responses = [record.outputs[0] for record in records]
    room = text.max_tokens - _counts(tokenizers, prompts)
    fits = (_counts(tokenizers, responses) + 1 <= room).all(0)
    return [
        Fitted(prompts[row], responses[row], True)
        if fits[row]
        else Fitted(prompts[row], _cut_response(records[row], tokenizers, room[:, row], text), False)
        for row in range(len(records))
    ]


def fit_prompt(record: Record, tokenizers: Sequence, text: Text) -> str:
    """`fit_prompts` for one record."""
    return fit_prompts([record], tokenizers, text)[0]


def fit_prompts(records: Sequence[Record], tokenizers: Sequence, text: Text) -> list[str]:
    """The prompt of each record, cut as in `fit_all`: all that generation needs.

    Raises:
        UserError: `text.max_prompt_tokens` leaves no room for anything of a record's prompt.
    """
    prompts = [full_prompt(record, text.template) for record in records]
    fits = (_counts(tokenizers, prompts) <= text.max_prompt_tokens).all(0)
    return [whole if fits[row] else _cut_prompt(records[row], tokenizers, text) for row, whole in enumerate(prompts)]


def _counts(tokenizers, texts) -> np.ndarray:
    """(tokenizers, texts) int64: numbers of tokens."""
    counts = np.empty((len(tokenizers), len(texts)), np.int64)
    for row, tokenizer in enumerate(tokenizers):
        for start in range(0, len(texts), _CHUNK):
            part = slice(start, start + _CHUNK)
            counts[row, part] = [len(ids) for ids in encode(tokenizer, texts[part])["input_ids"]]
    return counts


def _cut_prompt(record: Record, tokenizers, text: Text) -> str:
    def fits(candidate: str) -> bool:
        return all(_counts([tokenizer], [candidate])[0, 0] <= text.max_prompt_tokens for tokenizer in tokenizers)

    def with_input(length: int) -> str:
        return prompt(record.instruction, _beginning(record.input, length), text.template)

    def without_input(length: int) -> str:
        return prompt(_beginning(record.instruction, length), "", text.template)

    def end(length: int) -> str:
        return _end(record.prompt, length)

    if record.prompt is not None:
        shortened, length = end, _longest(len(record.prompt), lambda length: fits(end(length)))
        possible = bool(end(length))
    elif record.input and fits(with_input(0)):
        shortened, length = with_input, _longest(len(record.input), lambda length: fits(with_input(length)))
        possible = True
    else:
        length = _longest(len(record.instruction), lambda length: fits(without_input(length)))
        shortened, possible = without_input, bool(_beginning(record.instruction, length))
    if not possible:
        raise UserError(
            f"{record.id}: nothing of its prompt fits text.max_prompt_tokens ({text.max_prompt_tokens}); raise that limit"
        )
    return shortened(length)


def _cut_response(record: Record, tokenizers, room: np.ndarray, text: Text) -> str:
    whole = record.outputs[0]

    def fits(length: int) -> bool:
        beginning = [_beginning(whole, length)]
        return all(_counts([tokenizer], beginning)[0, 0] <= of for tokenizer, of in zip(tokenizers, room, strict=True))

    response = _beginning(whole, _longest(len(whole), fits))
    if not response:
        raise UserError(
            f"{record.id}: its prompt leaves no room for a response within text.max_tokens ({text.max_tokens});"
            " raise that limit or lower text.max_prompt_tokens"
        )
    return response


def _longest(length: int, fits: Callable[[int], bool]) -> int:
    """A number up to `length` that fits, or 0: the greatest, if what fits also fits when shorter (nearly so for tokens)."""
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _beginning(text: str, length: int) -> str:
    """At most the first `length` code points, without half a character or white space at the cut."""
    if length >= len(text):
        return text
    while length and not _is_boundary(text, length):
        length -= 1
    return text[:length].rstrip()


def _end(text: str, length: int) -> str:
    """At most the last `length` code points, likewise."""
    start = len(text) - length
    while 0 < start < len(text) and not _is_boundary(text, start):
        start += 1
    return text[start:].lstrip() if start else text


def _is_boundary(text: str, at: int) -> bool:
    """Whether a reader sees a new character begin at `at`: not an accent, a skin colour, the other half of a flag or a joined emoji."""
    if at == 0:
        return True
    letter = text[at]
    if unicodedata.category(letter) in ("Mn", "Me", "Mc") or "\U0001f3fb" <= letter <= "\U0001f3ff":
        return False
    if _JOINER in (letter, text[at - 1]):
        return False
    flags = 0
    while flags < at and "\U0001f1e6" <= text[at - flags - 1] <= "\U0001f1ff":
        flags += 1
    return not ("\U0001f1e6" <= letter <= "\U0001f1ff" and flags % 2)
