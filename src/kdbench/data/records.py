"""Records: what a model is asked and how it should answer, read from JSONL and checked row by row."""

import gzip
import json
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError
from kdbench.settings import EmbeddedData, FileData

KIND = "records"
_REPORTED = 10  # bad rows named in one error; the rest are counted
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One exercise.

    Attributes:
        id: "<data set>/<row>", the row counted from 1 as in the file.
        instruction: what to do; empty where `prompt` is given.
        input: what to do it with; often empty.
        prompt: a whole prompt that no template is put around, or None.
        outputs: the reference responses; models learn the first, scores take the best.
        category: kind of exercise, or empty.
    """

    id: str
    instruction: str
    input: str
    prompt: str | None
    outputs: tuple[str, ...]
    category: str = ""


def read_jsonl(path, rows: int | None = None, name: str | None = None) -> list[Record]:
    """Read records from a JSONL file, compressed with gzip where it is named `.gz`.

    A row has `instruction` and optionally `input`, or `prompt` alone (ignored beside an `instruction`), and `output`, a text or a list of
    texts. `category` or `topic` is taken over, other fields are not. Texts are brought to Unicode's NFC, as some tokenizers do by
    themselves and others do not: every model has to read the same bytes. White space around outputs is removed.

    Args:
        path: the file.
        rows: read only the first so many records.
        name: of the data set, for the ids; by default the file's name without its suffix.

    Raises:
        UserError: the file is missing, empty or cannot be read; a line for each bad row, ten at most.
    """
    return _read(Path(path), rows, name or Path(path).name.split(".")[0])[0]


def clean_output(text: str) -> str:
    """A response as records hold it, be it a person's or a model's: in NFC, without white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def write(folder, records: list[Record], **facts) -> None:
    """Write records and the manifest that describes them, all or nothing."""
    part = files.fresh_folder(folder)
    lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    files.write_text(part / "records.jsonl", "".join(lines))
    files.write_manifest(part, KIND, rows=len(records), **facts)
    files.finish_folder(folder)


def load(folder) -> list[Record]:
    """The records that `write` wrote.

    Raises:
        UserError: the folder is not finished or damaged.
    """
    files.read_manifest(folder, KIND)
    with open(files.folder_of(folder) / "records.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Record(**row | {"outputs": tuple(row["outputs"])}) for row in rows]


def prepare(settings: EmbeddedData | FileData, name: str, folder) -> None:
    """Make the records of a data set of the configuration.

    Args:
        settings: where they come from.
        name: of the data set; the ids start with it.
        folder: where they go.

    Raises:
        UserError: see `read_jsonl`.
    """
    if isinstance(settings, EmbeddedData):
        from kdbench.data import world

        drawn = world.records(settings.split, settings.rows, settings.seed)
        records, normalised = [replace(record, id=f"{name}/{row}") for row, record in enumerate(drawn, 1)], 0
    else:
        records, normalised = _read(Path(settings.path), settings.rows, name)
    write(folder, records, normalised=normalised)


def _read(path: Path, rows: int | None, name: str) -> tuple[list[Record], int]:
    """Records, and how many of them had a text that was not in NFC or had white space around it."""
    records: list[Record] = []
    problems: list[str] = []
    normalised = bad = 0
    for number, line in _lines(path):
        row, found = _object(line)
        if not found:
            found = _mistakes(row)
        if found:
            bad += 1
            if bad <= _REPORTED:
                problems.append(f"{path}:{number}: {found[0]}")
            continue
        record, changed = _record(row, f"{name}/{number}")
        records.append(record)
        normalised += changed
        if len(records) == rows:
            break
    if bad > _REPORTED:
        problems.append(f"... and {bad - _REPORTED} more")
    if problems:
        raise UserError("\n".join(problems))
    if not records:
        raise UserError(f"{path}: the file is empty: one JSON object a line is expected")
    return records, normalised


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _object(line: bytes) -> tuple[dict, list[str]]:
    """The JSON object of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, [f"the row is not UTF-8 (byte {error.start + 1} of the line)"]
    except (json.JSONDecodeError, RecursionError) as error:
        return {}, [f"the row is no JSON ({error}); one object a line is expected"]
    if not isinstance(row, dict):
        return {}, [f"the row is {_kind(row)}; an object with `instruction` and `output` is expected"]
    return row, []


def _mistakes(row: dict) -> list[str]:
    """What is wrong with the fields of a row, in their order."""
    found = []
    question = "instruction" if "instruction" in row or "prompt" not in row else "prompt"
    for field in (question, "output"):
        if field not in row:
            found.append(f"field '{field}': missing; the row has: {', '.join(row) or 'no fields'}")
    if question in row:
        found += _text_mistakes(question, row[question])
    if row.get("input") is not None:
        found += _text_mistakes("input", row["input"], may_be_empty=True)
    outputs = row.get("output", "-")
    if isinstance(outputs, list):
        if not outputs:
            found.append("field 'output': an empty list; at least one response is needed")
        for index, output in enumerate(outputs):
            found += _text_mistakes(f"output[{index}]", output)
    else:
        found += _text_mistakes("output", outputs, expected="a text or a list of texts")
    return found


def _text_mistakes(field: str, value, may_be_empty: bool = False, expected: str = "a text") -> list[str]:
    if not isinstance(value, str):
        return [f"field '{field}': {_kind(value)}; {expected} is expected"]
    if not value.strip() and not may_be_empty:
        return [f"field '{field}': empty"]
    if "\0" in value:
        return [f"field '{field}': holds a NUL character"]
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return [f"field '{field}': holds half of a surrogate pair, which is no character"]
    return []


def _kind(value) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _record(row: dict, name: str) -> tuple[Record, bool]:
    """A record of a row without mistakes, and whether a text of it was changed."""
    outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
    whole = None if "instruction" in row else row["prompt"]
    given = row.get("input") or "" if whole is None else ""
    before = (row.get("instruction", ""), given, whole, *outputs)
    instruction, text, prompt = (value and unicodedata.normalize("NFC", value) for value in before[:3])
    answers = [clean_output(output) for output in outputs]
    if prompt is not None:
        prompt = prompt.lstrip()  # Llama's tokenizer loses a space at the beginning of a text
    category = next((row[field] for field in ("category", "topic") if isinstance(row.get(field), str)), "")
    record = Record(name, instruction, text, prompt, tuple(answers), category)
    return record, (instruction, text, prompt, *answers) != before
