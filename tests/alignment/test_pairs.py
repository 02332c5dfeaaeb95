import numpy as np
import pytest

from kdbench import files, models
from kdbench.alignment.pairs import Alignment, align, index_pairs, quality
from kdbench.data import records, tokens, world
from kdbench.data.tokens import Tokens, TokenSide
from kdbench.errors import UserError
from kdbench.settings import Text
from tests.data.tokenizers import REAL, byte_level, sentencepiece
from tests.shared import SHARED, needs_shared

SHORT = Text(template="short", max_prompt_tokens=160, max_tokens=256)


def side(*rows):
    """A side whose records have the given response ends, behind a prompt of one token."""
    return TokenSide(
        ids=np.zeros(sum(map(len, rows)) + len(rows), np.int32),
        starts=np.cumsum([0, *(len(row) + 1 for row in rows)]),
        prompt_lengths=np.ones(len(rows), np.int32),
        ends=np.concatenate(rows).astype(np.int32),
    )


def both(student, teacher):
    return Tokens(side(*student), side(*teacher), False, {"student": 9, "teacher": 9}, 0, 0)


def as_pairs(alignment):
    return [list(zip(*(part.tolist() for part in alignment.row(row)), strict=True)) for row in range(alignment.rows)]


def spans(ends):
    return list(zip([0, *ends[:-1]], ends, strict=True))


def naive(student, teacher):
    """Token by token: the same bytes, and no second token on either side that has them too."""
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = spans(list(ours)), spans(list(theirs))
        found.append([
            (i, b.index(span)) for i, span in enumerate(a) if a.count(span) == 1 and b.count(span) == 1
        ])  # fmt: skip
    return found


def test_by_hand():
    # "hello you" + end of text: hel|lo| you|. against hello| y|ou|.
    made = both([[3, 5, 9, 10]], [[5, 7, 9, 10]])
    assert as_pairs(align(made)) == [[(3, 3)]]
    # the same cut in two places, a longer token in between
    assert as_pairs(align(both([[1, 2, 4, 6, 7]], [[1, 4, 6, 7]]))) == [[(0, 0), (3, 2), (4, 3)]]


def test_the_same_end_is_not_enough():
    assert as_pairs(align(both([[2, 5]], [[3, 5]]))) == [[]]


def test_tokens_without_bytes_pair_only_if_there_is_one_on_each_side():
    assert as_pairs(align(both([[0, 3]], [[0, 3]]))) == [[(0, 0), (1, 1)]]
    assert as_pairs(align(both([[0, 3]], [[3]]))) == [[(1, 0)]]
    assert as_pairs(align(both([[2, 2, 2, 3]], [[2, 2, 3]]))) == [[(0, 0), (3, 2)]]


def test_records_do_not_mix():
    made = both([[2, 3], [1], [4, 9]], [[3], [1], [4, 9]])
    assert as_pairs(align(made)) == [[], [(0, 0)], [(0, 0), (1, 1)]]


def test_a_response_cut_on_both_sides_has_no_end_of_text_to_pair():
    assert as_pairs(align(both([[2, 6]], [[4, 6]]))) == [[]]


def test_against_token_by_token_comparison():
    rng = np.random.default_rng(0)
    for _ in range(30):
        totals = rng.integers(1, 40, size=rng.integers(1, 12))
        student, teacher = (
            [np.sort([*rng.integers(0, total + 1, rng.integers(0, 25)), total]) for total in totals] for _ in range(2)
        )
        made = both(student, teacher)
        found = align(made)
        assert as_pairs(found) == naive([r.tolist() for r in student], [r.tolist() for r in teacher])
        assert (found.student.dtype, found.teacher.dtype, found.starts.dtype) == (np.int32, np.int32, np.int64)


def test_real_tokens_that_pair_are_the_same_text():
    some = world.records("shift", 50)
    made = tokens.tokenize(some, byte_level(), sentencepiece(), SHORT)
    found = align(made)
    for row, record in enumerate(some):
        text = record.outputs[0].encode() + b"$"
        ours, theirs = (
            [
                text[begin:end]
                for begin, end in spans(s.ends[s.response_starts[row] : s.response_starts[row + 1]].tolist())
            ]
            for s in (made.student, made.teacher)
        )
        pairs = as_pairs(found)[row]
        assert pairs[-1] == (len(ours) - 1, len(theirs) - 1), "end of text with end of text"
        assert all(ours[i] == theirs[j] for i, j in pairs)
    assert quality(made, found)["byte"] > 0.3


def test_one_tokenizer_pairs_everything():
    made = tokens.tokenize(world.records("dev", 20), byte_level(), byte_level(), SHORT)
    found = align(made)
    assert (found.student == found.teacher).all()
    assert (np.diff(found.starts) == made.student.response_counts).all()
    shares = quality(made, found)
    assert (shares["byte"], shares["index"]) == (1, 1)


def test_index_pairs():
    found = index_pairs(np.array([2, 1, 3]), np.array([1, 4, 3]))
    assert as_pairs(found) == [[(0, 0)], [(0, 0)], [(0, 0), (1, 1), (2, 2)]]
    assert (found.student.dtype, found.starts.dtype) == (np.int32, np.int64)


def test_quality():
    made = both([[1, 2, 4, 6, 7], [2, 3]], [[1, 4, 6, 7], [1, 3]])
    assert quality(made, align(made)) == {
        "byte": round(3 / 7, 6), "index": round(1 / 7, 6), "rows": 2, "student_tokens": 7, "teacher_tokens": 6,
    }  # fmt: skip


def test_a_teacher_is_needed():
    made = tokens.tokenize(world.records("dev", 2), byte_level(), None, SHORT)
    with pytest.raises(ValueError, match="not tokenised for a teacher"):
        align(made)


def test_save_and_load(tmp_path):
    made = tokens.tokenize(world.records("dev", 20), byte_level(), sentencepiece(), SHORT)
    found = align(made)
    found.save(tmp_path / "a", quality(made, found), tokens="abc")
    loaded = Alignment.load(tmp_path / "a" / "manifest.json")
    assert as_pairs(loaded) == as_pairs(found)
    assert [getattr(loaded, name).dtype for name in ("student", "teacher", "starts")] == [np.int32, np.int32, np.int64]
    manifest = files.read_manifest(tmp_path / "a", "alignment")
    assert (manifest["tokens"], manifest["quality"]) == ("abc", quality(made, found))
    (tmp_path / "a" / "alignment.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        Alignment.load(tmp_path / "a")


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "byte", "index"),
    [(REAL[0], REAL[1], 0.904, 0.294), (REAL[4], REAL[5], 0.888, 0.230), (REAL[0], REAL[5], 0.883, 0.123)],
)
def test_published_pairs_of_tokenizers_match_as_measured_before(student, teacher, byte, index):
    some = records.read_jsonl(SHARED / "data/dolly/dev.jsonl")
    assert len(some) == 1000
    whole = Text(max_prompt_tokens=2000, max_tokens=8000)
    made = tokens.tokenize(some, *(models.load_tokenizer(SHARED / folder) for folder in (student, teacher)), whole)
    found = quality(made, align(made))
    assert found["byte"] == pytest.approx(byte, abs=0.005)
    assert found["index"] == pytest.approx(index, abs=0.005)
