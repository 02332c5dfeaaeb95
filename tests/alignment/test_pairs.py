import itertools

import numpy as np
import pytest

from kdbench import files, models
from kdbench.alignment.pairs import Alignment, align, chunks, index_pairs, quality
from kdbench.data import records, tokens, world
from kdbench.data.records import Record
from kdbench.data.spans import Spans, token_bytes
from kdbench.data.tokens import Tokens, TokenSide
from kdbench.errors import UserError
from kdbench.settings import Text
from tests.data.tokenizers import HARD, REAL, byte_level, sentencepiece
from tests.shared import SHARED, needs_shared

SHORT = Text(template="short", max_prompt_tokens=160, max_tokens=256)
PUBLISHED = ("gpt2", "qwen1.5-1.8b", "llama2-7b", "mistral-7b-v0.1", "tinyllama-1.1b-3t")
HARD_ANSWERS = (
    *HARD,
    "",
    "x",
    "\n",
    "\tindented\t",
    "ends with spaces   ",
    "  begins with spaces",
    " ",
    "line\r\nline\r\n",
    "\ufeffbyte order mark",
    "a\u200bb\u00a0c\u3000d",
    "\U0001f9d1\u200d\U0001f52c\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\u1ea4\u0111\u01b0\u1ee3c \u1eb7ng \u1ed5 \u1ef9",
    "\u9f98\U00020000\U00030000\ua66e",
    "</s></s><s>[INST] <|im_start|>user<|endoftext|> ### Response:\n",
    "<0x0A> \\x0a \x00\x01\x7f",
    "= " * 40 + "=" * 100,
)


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
    assert (loaded.student_chunks == found.student_chunks).all()
    assert (loaded.teacher_chunks == found.teacher_chunks).all()
    assert [getattr(loaded, name).dtype for name in ("student", "teacher", "starts")] == [np.int32, np.int32, np.int64]
    manifest = files.read_manifest(tmp_path / "a", "alignment")
    assert (manifest["tokens"], manifest["quality"]) == ("abc", quality(made, found))
    (tmp_path / "a" / "alignment.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        Alignment.load(tmp_path / "a")


def of_row(values, side_, row):
    """The part of a column over response tokens that belongs to a record."""
    return values[side_.response_starts[row] : side_.response_starts[row + 1]].tolist()


def naive_chunks(student, teacher):
    """Walk along the bytes; a piece is over where both sides have a token that ends. What ends at the same byte goes with it."""
    found = [], []
    for rows in zip(student, teacher, strict=True):
        common = sorted({end for end in rows[0] if end > 0} & set(rows[1]))
        for numbers, ends in zip(found, rows, strict=True):
            numbers += [sum(cut < end for cut in common) for end in ends]
    return found


def test_chunks_by_hand():
    # "hello you" + end of text: hel|lo| you|. against hello| y|ou|.
    ours, theirs = chunks(both([[3, 5, 9, 10]], [[5, 7, 9, 10]]))
    assert (ours.tolist(), theirs.tolist()) == ([0, 0, 1, 2], [0, 1, 1, 2])
    assert (ours.dtype, theirs.dtype) == (np.int32, np.int32)


def test_a_token_without_bytes_has_no_chunk_of_its_own():
    ours, theirs = chunks(both([[0, 3, 3, 5, 6]], [[3, 5, 6]]))
    assert (ours.tolist(), theirs.tolist()) == ([0, 0, 0, 1, 2], [0, 1, 2])


def test_empty_and_cut_responses_have_chunks():
    ours, theirs = chunks(both([[1], [2, 6], [3, 4]], [[1], [4, 6], [3, 4]]))
    assert (ours.tolist(), theirs.tolist()) == ([0, 0, 0, 0, 1], [0, 0, 0, 0, 1])


def test_chunks_against_a_walk_along_the_bytes():
    rng = np.random.default_rng(1)
    for _ in range(30):
        totals = rng.integers(1, 30, size=rng.integers(1, 12))
        student, teacher = (
            [np.sort([*rng.integers(0, total, rng.integers(0, 20)), total, total + 1]).tolist() for total in totals]
            for _ in range(2)
        )
        made = both(student, teacher)
        ours, theirs = chunks(made)
        assert (ours.tolist(), theirs.tolist()) == naive_chunks(student, teacher)
        for row in range(made.rows):
            a, b = of_row(ours, made.student, row), of_row(theirs, made.teacher, row)
            assert set(a) == set(b) == set(range(a[-1] + 1))
            assert (a.count(a[-1]), b.count(b[-1])) == (1, 1), "the end of text is alone"


def test_pairs_are_chunks_of_one_token_on_either_side():
    made = tokens.tokenize(world.records("shift", 50), byte_level(), sentencepiece(), SHORT)
    found = align(made)
    for row in range(made.rows):
        ours = of_row(found.student_chunks, made.student, row)
        theirs = of_row(found.teacher_chunks, made.teacher, row)
        single = [
            (ours.index(number), theirs.index(number))
            for number in range(ours[-1] + 1)
            if ours.count(number) == theirs.count(number) == 1
        ]
        assert as_pairs(found)[row] == single


def pieces_of(side_, row, table, end, text):
    """The bytes of each response token by its span, after a look at what the tokenizer's own table says of it."""
    ids, ends = side_.row(row)[side_.prompt_lengths[row] :], of_row(side_.ends, side_, row)
    pieces = [text[begin:end] for begin, end in spans(ends)]
    assert b"".join(pieces) == text
    assert (ids[-1], pieces[-1], ends[-1]) == (end, b"", len(text) + 1)
    said = [table[token] for token in ids[:-1]]
    if b"".join(said) != text:  # SentencePiece puts a space before a text
        assert said[0].startswith(b" ")
        said[0] = said[0][1:]
    assert pieces[:-1] == said
    return pieces


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), list(itertools.combinations(PUBLISHED, 2)))
def test_published_tokenizers_cover_the_same_bytes(student, teacher):
    """On real rows and on hard texts; a text that a tokenizer does not give back is refused."""
    pair = [models.load_tokenizer(SHARED / "tokenizers" / folder) for folder in (student, teacher)]
    whole = Text(max_prompt_tokens=2000, max_tokens=8000)
    encoders = [Spans(tokenizer) for tokenizer in pair]
    lost = [text for text in HARD_ANSWERS if any(each.encode([text])[0].difference for each in encoders)]
    assert all(text.startswith(" ") for text in lost), "Llama's loses these, and records never begin with a space"
    hard = [Record(f"hard/{number}", "Say it.", "", None, (text,)) for number, text in enumerate(HARD_ANSWERS)]
    for record in hard:
        if record.outputs[0] in lost:
            with pytest.raises(UserError, match="does not give its response back"):
                tokens.tokenize([record], *pair, whole)
    some = [record for record in hard if record.outputs[0] not in lost]
    some += records.read_jsonl(SHARED / "data/dolly/dev.jsonl", rows=100)
    made = tokens.tokenize(some, *pair, whole)
    found = align(made)
    tables = [token_bytes(tokenizer) for tokenizer in pair]
    for row, record in enumerate(some):
        text = record.outputs[0].encode()
        ours, theirs = (
            pieces_of(side_, row, table, tokenizer.eos_token_id, text)
            for side_, table, tokenizer in zip((made.student, made.teacher), tables, pair, strict=True)
        )
        pairs = as_pairs(found)[row]
        assert pairs[-1] == (len(ours) - 1, len(theirs) - 1), "end of text with end of text"
        assert all(ours[i] == theirs[j] for i, j in pairs)
        joined = []
        for pieces, numbers in (
            (ours, of_row(found.student_chunks, made.student, row)),
            (theirs, of_row(found.teacher_chunks, made.teacher, row)),
        ):
            joined.append([b""] * (numbers[-1] + 1))
            for piece, number in zip(pieces, numbers, strict=True):
                joined[-1][number] += piece
        assert joined[0] == joined[1]
        assert all(joined[0][:-1]), "a chunk that is not the end of text has bytes"
        assert joined[0][-1] == b""


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
