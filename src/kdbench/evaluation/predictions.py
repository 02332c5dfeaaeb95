"""Answers of a model, and the file that holds them. What scores them needs no model, so nothing here imports torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kdbench import files
from kdbench.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        id: of the record.
        prompt: the text that the model read.
        prompt_cut: whether that is less than the record's, which was too long.
        prediction: the text that it wrote.
        references: the reference responses.
        tokens: tokens written, end of text included.
        stop: "eos", or "length" where the limit cut it off.
    """

    id: str
    prompt: str
    prompt_cut: bool
    prediction: str
    references: list[str]
    tokens: int
    stop: str


def write(path, predictions: Sequence[Prediction]) -> None:
    """JSONL, a line for each answer, all or nothing."""
    files.write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions))


def read(path) -> list[Prediction]:
    """What `write` wrote.

    Raises:
        UserError: the file is missing, empty or damaged; names the line.
    """
    try:
        with open(path, "rb") as file:
            found = [_parsed(path, number, line) for number, line in enumerate(file, 1)]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the rule `generate`") from None
    if not found:
        raise UserError(f"{path} is empty: delete it and run again")
    return found


def _parsed(path, number: int, line: bytes) -> Prediction:
    try:
        return Prediction(**json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}:{number}: no prediction ({error}): delete the file and run again") from None
