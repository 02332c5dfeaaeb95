"""Pairs and chunks of student and teacher response tokens, from the text alone, computed once for a data set and two tokenizers."""

from dataclasses import dataclass, fields

import numpy as np

from kdbench import files
from kdbench.data.tokens import Tokens, TokenSide, read_columns
from kdbench.errors import UserError

KIND = "alignment"
_FILE = "alignment.safetensors"


@dataclass(frozen=True)
class Alignment:
    """Pairs of response tokens; both are counted from the start of their record's response.

    Attributes:
        student: (p,) int32, ascending within a record.
        teacher: (p,) int32, ascending within a record.
        starts: (rows + 1,) int64, where each record's pairs start.
        student_chunks: (r_s,) int32, of each response token of the student the chunk of its record that it belongs to, see `chunks`; None
            where pairs are all that is known.
        teacher_chunks: (r_t,) int32, of the teacher's.
    """

    student: np.ndarray
    teacher: np.ndarray
    starts: np.ndarray
    student_chunks: np.ndarray | None = None
    teacher_chunks: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.starts) - 1

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of one record: student's and teacher's tokens, (p,) int32 each."""
        part = slice(self.starts[row], self.starts[row + 1])
        return self.student[part], self.teacher[part]

    def save(self, folder, quality: dict, **facts) -> None:
        """Write the pairs, the chunks and the manifest that describes them, all or nothing.

        Args:
            folder: where to.
            quality: see `quality`.
            facts: what else the manifest is to say, such as the fingerprint of the tokens (`tokens=`).
        """
        from safetensors.numpy import save_file

        part = files.fresh_folder(folder)
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        save_file({name: column for name, column in columns.items() if column is not None}, part / _FILE)
        files.write_manifest(part, KIND, quality=quality, **facts)
        files.finish_folder(folder)

    @classmethod
    def load(cls, folder, expected_tokens: str | None = None) -> "Alignment":
        """What `save` wrote.

        Args:
            folder: where it lies.
            expected_tokens: fingerprint of the tokens that it has to be of.

        Raises:
            UserError: the folder is not finished, damaged, or of other tokens.
        """
        check_tokens(folder, KIND, expected_tokens)
        return cls(**read_columns(files.folder_of(folder) / _FILE))


def check_tokens(folder, kind: str, expected: str | None) -> None:
    """Make sure that a folder is finished, whole, and made of the tokens of this fingerprint (None: of any).

    Raises:
        UserError: it is not; says how to make it anew.
    """
    made_of = files.read_manifest(folder, kind).get("tokens")
    if expected not in (None, made_of):
        raise UserError(
            f"{folder} is stale: it is of the tokens {made_of}, the run asks for {expected}; "
            f"make it anew: snakemake --cores all --forcerun {files.folder_of(folder) / files.MANIFEST}"
        )


def align(tokens: Tokens) -> Alignment:
    """Pair the response tokens that cover exactly the same bytes, one to one; the end of text with the end of text. And cut into chunks.

    Raises:
        ValueError: there are no teacher's tokens.
    """
    student, teacher = _sides(tokens)
    limits = _row_limits(student, teacher)
    ours, ours_at = _unique(_keys(student, limits))
    theirs, theirs_at = _unique(_keys(teacher, limits))
    _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    i, j = ours_at[i], theirs_at[j]
    begins, begins_teacher = _begins(student), _begins(teacher)
    same = begins[i] == begins_teacher[j]
    i, j = i[same], j[same]
    row = np.searchsorted(student.response_starts, i, side="right") - 1
    return Alignment(
        (i - student.response_starts[row]).astype(np.int32),
        (j - teacher.response_starts[row]).astype(np.int32),
        np.searchsorted(row, np.arange(tokens.rows + 1)).astype(np.int64),
        *chunks(tokens),
    )


def chunks(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Cut every response into its shortest pieces that end with a token on both sides, and tell the piece of each token.

    The end of text is a chunk of its own. A token without bytes belongs to the chunk whose bytes it stands behind; at the beginning of a
    response, to the first one.

    Returns:
        (r_s,) and (r_t,) int32, numbers of chunks, counted from 0 in each record; the student's and the teacher's tokens of a record are in
        the same chunks.

    Raises:
        ValueError: there are no teacher's tokens.
    """
    student, teacher = _sides(tokens)
    limits = _row_limits(student, teacher)
    ends = [np.repeat(limits, side.response_counts) + side.ends for side in (student, teacher)]
    common = np.intersect1d(ends[0][student.ends > 0], ends[1])
    first = np.searchsorted(common, limits)
    found = [
        np.searchsorted(common, end) - np.repeat(first, side.response_counts)
        for end, side in zip(ends, (student, teacher), strict=True)
    ]
    return found[0].astype(np.int32), found[1].astype(np.int32)


def index_pairs(student_counts: np.ndarray, teacher_counts: np.ndarray) -> Alignment:
    """Pair the response tokens by their position, as far as the shorter response goes.

    Args:
        student_counts: (rows,) response tokens of each record on the student's side.
        teacher_counts: (rows,) on the teacher's.
    """
    shorter = np.minimum(student_counts, teacher_counts)
    starts = np.concatenate([[0], np.cumsum(shorter, dtype=np.int64)])
    position = (np.arange(starts[-1]) - np.repeat(starts[:-1], shorter)).astype(np.int32)
    return Alignment(position, position, starts)


def quality(tokens: Tokens, alignment: Alignment) -> dict:
    """How well two tokenizations match.

    Returns:
        "byte": share of the student's response tokens that `alignment` pairs; "index": share whose token at the same position covers the
        same bytes; "rows", "student_tokens", "teacher_tokens": counts (response tokens).
    """
    student, teacher = _sides(tokens)
    pairs = index_pairs(student.response_counts, teacher.response_counts)
    row = np.repeat(np.arange(pairs.rows), np.diff(pairs.starts))
    i, j = student.response_starts[row] + pairs.student, teacher.response_starts[row] + pairs.teacher
    same = (student.ends[i] == teacher.ends[j]) & (_begins(student)[i] == _begins(teacher)[j])
    count = len(student.ends)
    return {
        "byte": round(len(alignment.student) / count, 6),
        "index": round(int(same.sum()) / count, 6),
        "rows": tokens.rows,
        "student_tokens": count,
        "teacher_tokens": len(teacher.ends),
    }


def _sides(tokens: Tokens) -> tuple[TokenSide, TokenSide]:
    if tokens.teacher is None:
        raise ValueError("these records were not tokenised for a teacher")
    return tokens.student, tokens.teacher


def _begins(side: TokenSide) -> np.ndarray:
    """(r,) int32, the byte of its response at which each token begins: where the one before it ends."""
    begins = np.concatenate([[0], side.ends[:-1]]).astype(np.int32)
    begins[side.response_starts[:-1]] = 0
    return begins


def _row_limits(student: TokenSide, teacher: TokenSide) -> np.ndarray:
    """(rows,) int64, a number for each record such that number + byte names a byte of the whole data set."""
    longest = np.maximum(*(side.ends[side.response_starts[1:] - 1] for side in (student, teacher))).astype(np.int64)
    return np.concatenate([[0], np.cumsum(longest + 1)[:-1]])


def _keys(side: TokenSide, limits: np.ndarray) -> np.ndarray:
    """(r,) int64, the end of each token in the whole data set, doubled; odd for a token without bytes, which ends where the last does."""
    end = np.repeat(limits, side.response_counts) + side.ends
    return 2 * end + (side.ends == _begins(side))


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys that occur once, and where. Others (several tokens without bytes in one place) cannot be paired one to one."""
    values, where, counts = np.unique(keys, return_index=True, return_counts=True)
    return values[counts == 1], where[counts == 1]
