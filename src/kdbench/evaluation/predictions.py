"""Answers of a model, and the file that holds them. What scores them needs no model, so nothing here imports torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError

_IDENTITY = "identity.json"


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


def identity(model, records, settings: dict, seed: int) -> dict:
    """What decides a set of answers: two that agree in it are the same.

    Args:
        model, records: finished folders, or their manifests.
        settings: all that decides how a model writes, as JSON.
        seed: decode seed.

    Raises:
        UserError: a manifest is missing.
    """
    read = {"model": model, "records": records}
    contents = {kind: files.read_json(files.folder_of(path) / files.MANIFEST) for kind, path in read.items()}
    made_from = {kind: content["fingerprint"] for kind, content in contents.items()}
    return made_from | {"settings": settings, "seed": seed}


def write(path, predictions: Sequence[Prediction], made_from: dict) -> None:
    """JSONL, a line for each answer, all or nothing; and beside it, in `identity.json`, what it was made from.

    Args:
        path: the file.
        predictions: the answers.
        made_from: see `identity`.
    """
    note = Path(path).with_name(_IDENTITY)
    note.unlink(missing_ok=True)  # it must never stand beside other answers than its own
    files.write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions))
    files.write_json(note, {"made_from": made_from, "sha256": files.sha256(path)})


def is_made_from(path, made_from: dict) -> bool:
    """Whether a file holds, unchanged, the answers of this very identity."""
    path = Path(path)
    note = path.with_name(_IDENTITY)
    if not path.exists() or not note.exists():
        return False
    return files.read_json(note) == {"made_from": made_from, "sha256": files.sha256(path)}


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
