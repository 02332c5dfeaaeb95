"""How alike the tokens of a student and of a teacher are spelled: edit distances, and the warping path through them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdbench import files, progress
from kdbench.alignment.dtw import on_path, warping_path
from kdbench.alignment.pairs import Alignment, check_tokens
from kdbench.data.tokens import Tokens, TokenSide, read_columns

KIND = "spelling"
_FILE = "spelling.safetensors"
_PART = 64  # records between two looks at the progress


def bare(text: bytes) -> bytes:
    """The bytes of a token without the spaces that mark the start of a word (`Ġ` and `▁` in the names of tokens)."""
    return text.replace(b" ", b"")


def edit_distances(student: Sequence[str | bytes], teacher: Sequence[str | bytes]) -> np.ndarray:
    """(n, m) int32, Levenshtein distances of every text of the one with every text of the other, in characters or bytes."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    ours, row = _distinct(student)
    theirs, column = _distinct(teacher)
    return cdist(ours, theirs, scorer=Levenshtein.distance, dtype=np.int32)[np.ix_(row, column)]


def normalised(distances: np.ndarray, student_lengths: np.ndarray, teacher_lengths: np.ndarray) -> np.ndarray:
    """Distances divided by the length of the longer text: 0 for the same text, at most 1.

    Args:
        distances: (..., n, m).
        student_lengths: (..., n) lengths of the texts.
        teacher_lengths: (..., m).

    Returns:
        (..., n, m) float32.
    """
    longer = np.maximum(student_lengths[..., :, None], teacher_lengths[..., None, :])
    return distances.astype(np.float32) / np.maximum(longer, 1).astype(np.float32)


def lexical_costs(
    student: Sequence[str | bytes], teacher: Sequence[str | bytes], published: bool = False
) -> np.ndarray:
    """(n, m) lexical costs of two series of texts.

    Args:
        student: n texts.
        teacher: m texts.
        published: as in the published code of MCW-KD: plain distances (float64), and 0 for all pairs off the two warping paths, so that
            what is alike costs as much as what has nothing in common. Else every pair costs its normalised distance (float32).
    """
    distances = edit_distances(student, teacher)
    if published:
        return on_path(distances)
    return normalised(distances, *(np.array([len(text) for text in texts]) for texts in (student, teacher)))


@dataclass(frozen=True)
class Spelling:
    """Of every record, the distances of the tokens just read at its response positions, and the path through them.

    Attributes:
        distances: (Σ n·m,) uint8 or uint16, edit distances in bytes, of each record a matrix of student by teacher positions, row by row.
        starts: (rows + 1,) int64, where each record starts in `distances`.
        student_lengths: (r_s,) uint8 or uint16, bytes of the token just read at each response position of the student.
        teacher_lengths: (r_t,) of the teacher.
        pairs: the student's positions whom the warping path of the record pairs with exactly one of the teacher, and those.
    """

    distances: np.ndarray
    starts: np.ndarray
    student_lengths: np.ndarray
    teacher_lengths: np.ndarray
    pairs: Alignment

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.starts) - 1

    def save(self, folder, **facts) -> None:
        """Write all of it and the manifest that describes it, all or nothing.

        Args:
            folder: where to.
            facts: what else the manifest is to say, such as the fingerprint of the tokens (`tokens=`).
        """
        from safetensors.numpy import save_file

        columns = {name: getattr(self, name) for name in ("distances", "starts", "student_lengths", "teacher_lengths")}
        columns |= {f"pairs.{name}": getattr(self.pairs, name) for name in ("student", "teacher", "starts")}
        part = files.fresh_folder(folder)
        save_file(columns, part / _FILE)
        files.write_manifest(part, KIND, rows=self.rows, **facts)
        files.finish_folder(folder)

    @classmethod
    def load(cls, folder, expected_tokens: str | None = None) -> "Spelling":
        """What `save` wrote; the distances are mapped into memory, not read.

        Args:
            folder: where it lies.
            expected_tokens: fingerprint of the tokens that it has to be of.

        Raises:
            UserError: the folder is not finished, damaged, or of other tokens.
        """
        check_tokens(folder, KIND, expected_tokens)
        columns = read_columns(files.folder_of(folder) / _FILE)
        pairs = Alignment(*(columns.pop(f"pairs.{name}") for name in ("student", "teacher", "starts")))
        return cls(**columns, pairs=pairs)


def spell(tokens: Tokens, student_texts: Sequence[bytes], teacher_texts: Sequence[bytes]) -> Spelling:
    """Compare the tokens that student and teacher have just read at each response position: the prompt's last one, then the response's.

    Args:
        tokens: of both models.
        student_texts: bytes of each token of the student's tokenizer, by id; spaces do not count.
        teacher_texts: of the teacher's.

    Raises:
        ValueError: there are no teacher's tokens.
    """
    if tokens.teacher is None:
        raise ValueError("these records were not tokenised for a teacher")
    sides = (tokens.student, tokens.teacher)
    read = [_texts_read(side, texts) for side, texts in zip(sides, (student_texts, teacher_texts), strict=True)]
    starts = [side.response_starts for side in sides]
    lengths = [np.array([len(text) for text in texts], np.int64) for texts in read]
    width = np.uint8 if max(int(of.max(initial=0)) for of in lengths) < 256 else np.uint16
    distances, paths = [], []
    for part in progress.over("spelling")(range(0, tokens.rows, _PART)):
        for row in range(part, min(part + _PART, tokens.rows)):
            found = edit_distances(*(texts[at[row] : at[row + 1]] for texts, at in zip(read, starts, strict=True)))
            distances.append(found.astype(width).reshape(-1))
            paths.append(one_to_one(found))
    sizes = [len(path) for path in paths]
    both = np.concatenate([*paths, np.empty((0, 2))]).astype(np.int32)
    pairs = Alignment(*np.ascontiguousarray(both.T), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
    ends = np.cumsum([len(of) for of in distances], dtype=np.int64)
    return Spelling(
        np.concatenate([*distances, np.empty(0, width)]),
        np.concatenate([[0], ends]),
        *(of.astype(width) for of in lengths),
        pairs,
    )


def one_to_one(distances: np.ndarray) -> np.ndarray:
    """(p, 2) int64, the student's positions that the path pairs with exactly one of the teacher; the teacher is the path's first series.

    Args:
        distances: (n, m), student by teacher.
    """
    path = warping_path(distances.T)[:, ::-1]
    return path[np.bincount(path[:, 0])[path[:, 0]] == 1]


def _texts_read(side: TokenSide, texts: Sequence[bytes]) -> list[bytes]:
    """Of every response position, the bare bytes of the token before its target."""
    counts = side.response_counts
    before = np.repeat(side.starts[:-1] + side.prompt_lengths - 1 - side.response_starts[:-1], counts)
    ids = side.ids[before + np.arange(counts.sum())]
    known = {token: bare(texts[token]) for token in np.unique(ids).tolist()}
    return [known[token] for token in ids.tolist()]


def _distinct(texts: Sequence[str | bytes]) -> tuple[list[str], list[int]]:
    """The texts that occur, once each, and which of them stands where. Bytes become the characters of the same numbers."""
    found: dict[str | bytes, int] = {}
    place = [found.setdefault(text, len(found)) for text in texts]
    return [text.decode("latin-1") if isinstance(text, bytes) else text for text in found], place
