"""Tokenised records in columns: one pass over a data set for a student and its teacher, with the byte span of every response token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdbench import files, progress
from kdbench.data.records import Record
from kdbench.data.spans import Spans
from kdbench.data.text import Fitted, Once, fit_all, full_prompt
from kdbench.errors import UserError
from kdbench.settings import Text

KIND = "tokens"
_FILE = "tokens.safetensors"
_COLUMNS = ("ids", "starts", "prompt_lengths", "ends")
_CHUNK = 1024  # records whose tokens are lists at the same time


@dataclass(frozen=True)
class TokenSide:
    """All records in the tokens of one tokenizer.

    Attributes:
        ids: (t,) int32, of each record its prompt, its response, and an end-of-text token if the response is complete.
        starts: (rows + 1,) int64, where each record starts in `ids`.
        prompt_lengths: (rows,) int32, tokens of each prompt.
        ends: (r,) int32, of each response token the byte of the response's UTF-8 at which it ends; the end-of-text token counts as one
            byte behind the response.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    ends: np.ndarray

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64, tokens of each record."""
        return np.diff(self.starts)

    @property
    def response_counts(self) -> np.ndarray:
        """(rows,) int64, response tokens of each record, end of text included."""
        return self.lengths - self.prompt_lengths

    @property
    def response_starts(self) -> np.ndarray:
        """(rows + 1,) int64, where each record starts in `ends`."""
        return np.concatenate([[0], np.cumsum(self.response_counts)])

    def row(self, row: int) -> np.ndarray:
        """(length,) int32, the ids of one record."""
        return self.ids[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class Tokens:
    """A data set in tokens.

    Attributes:
        student: in the student's tokens.
        teacher: in the teacher's; None if there is no teacher. The same object as `student` if they share their tokenizer.
        same_tokenizer: whether they share it.
        vocabulary: number of tokens of each tokenizer, by "student" and "teacher".
        prompts_cut: records whose prompt was too long.
        responses_cut: records whose response was too long; no end of text follows these.
    """

    student: TokenSide
    teacher: TokenSide | None
    same_tokenizer: bool
    vocabulary: dict[str, int]
    prompts_cut: int
    responses_cut: int

    @property
    def rows(self) -> int:
        """Number of records."""
        return self.student.rows

    def save(self, folder, **facts) -> None:
        """Write the columns and the manifest that describes them, all or nothing.

        Args:
            folder: where to.
            facts: what else the manifest is to say, such as the fingerprint of the records.
        """
        from safetensors.numpy import save_file

        sides = {"student": self.student}
        if self.teacher is not None and not self.same_tokenizer:
            sides["teacher"] = self.teacher
        columns = {f"{name}.{column}": getattr(side, column) for name, side in sides.items() for column in _COLUMNS}
        part = files.fresh_folder(folder)
        save_file(columns, part / _FILE)
        files.write_manifest(
            part,
            KIND,
            rows=self.rows,
            same_tokenizer=self.same_tokenizer,
            vocabulary=self.vocabulary,
            prompts_cut=self.prompts_cut,
            responses_cut=self.responses_cut,
            **facts,
        )
        files.finish_folder(folder)

    @classmethod
    def load(cls, folder) -> "Tokens":
        """What `save` wrote; the columns are mapped into memory, not read.

        Raises:
            UserError: the folder is not finished or damaged.
        """
        manifest = files.read_manifest(folder, KIND)
        columns = read_columns(files.folder_of(folder) / _FILE)
        sides = {
            name: TokenSide(*(columns[f"{name}.{column}"] for column in _COLUMNS))
            for name in ("student", "teacher")
            if f"{name}.ids" in columns
        }
        facts = {key: manifest[key] for key in ("same_tokenizer", "vocabulary", "prompts_cut", "responses_cut")}
        if facts["same_tokenizer"]:
            sides["teacher"] = sides["student"]
        return cls(sides["student"], sides.get("teacher"), **facts)


def read_columns(path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped into memory; what is written to them stays out of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (it is no dictionary)


def same_vocabulary(a, b) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return a.get_vocab() == b.get_vocab()


def tokenize(records: Sequence[Record], student, teacher, text: Text) -> Tokens:
    """Tokenise records for a student and its teacher, so that both read the same bytes.

    Args:
        records: what to tokenise; the first output of each is its response.
        student: tokenizer.
        teacher: tokenizer, or None where there is no teacher.
        text: template and limits.

    Raises:
        UserError: a record whose tokens do not stand for exactly its text, by id and first difference; limits that leave no room.
    """
    same = teacher is not None and same_vocabulary(student, teacher)
    tokenizers = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    read = {"student": student} if same else tokenizers
    columns = {name: _Columns(name, tokenizer) for name, tokenizer in read.items()}
    prompts_cut = responses_cut = 0
    for start in progress.over("tokens")(range(0, len(records), _CHUNK)):
        part = records[start : start + _CHUNK]
        once = [Once(tokenizer) for tokenizer in read.values()]
        fitted = fit_all(part, once, text)
        for side, tokenizer in zip(columns.values(), once, strict=True):
            side.add(part, fitted, tokenizer)
        wholes = (full_prompt(record, text.template) for record in part)
        prompts_cut += sum(one.prompt != whole for whole, one in zip(wholes, fitted, strict=True))
        responses_cut += sum(not one.complete for one in fitted)
    sides = {name: side.finish() for name, side in columns.items()}
    return Tokens(
        sides["student"],
        sides["student"] if same else sides.get("teacher"),
        same,
        {name: len(tokenizer) for name, tokenizer in tokenizers.items()},
        prompts_cut,
        responses_cut,
    )


class _Columns:
    """One side in the making."""

    def __init__(self, name: str, tokenizer):
        self._name, self._spans = name, Spans(tokenizer)
        self._end = np.array([tokenizer.eos_token_id], np.int32)
        self._ids: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._prompt_lengths: list[int] = []

    def add(self, records: Sequence[Record], fitted: list[Fitted], tokenizer) -> None:
        prompts = self._spans.encode([one.prompt for one in fitted], tokenizer)
        responses = self._spans.encode([one.response for one in fitted], tokenizer)
        for record, one, asked, said in zip(records, fitted, prompts, responses, strict=True):
            for what, found in (("prompt", asked), ("response", said)):
                if found.difference:
                    raise UserError(
                        f"{record.id}: the {self._name}'s tokenizer does not give its {what} back: {found.difference};"
                        " change or remove this record"
                    )
            self._ids += [asked.ids, said.ids]
            self._ends.append(said.ends)
            if one.complete:
                self._ids.append(self._end)
                self._ends.append(np.array([len(one.response.encode()) + 1], np.int32))
            self._prompt_lengths.append(len(asked.ids))
            self._lengths.append(len(asked.ids) + len(said.ids) + one.complete)

    def finish(self) -> TokenSide:
        return TokenSide(
            np.concatenate(self._ids),
            np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]),
            np.array(self._prompt_lengths, np.int32),
            np.concatenate(self._ends),
        )
