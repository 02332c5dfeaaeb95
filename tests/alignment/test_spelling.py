import numpy as np
import pytest

from kdbench import files
from kdbench.alignment.dtw import warping_path
from kdbench.alignment.spelling import Spelling, bare, edit_distances, lexical_costs, normalised, one_to_one, spell
from kdbench.alignment.vocabulary import texts_of
from kdbench.data import tokens, world
from kdbench.data.tokens import Tokens, TokenSide
from kdbench.errors import UserError
from kdbench.settings import Text
from tests.data.tokenizers import byte_level, sentencepiece

SHORT = Text(template="short", max_prompt_tokens=160, max_tokens=256)


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@pytest.fixture(scope="module")
def real():
    """Tokens of the embedded records by two kinds of tokenizers, the bytes of the tokens, and what is made of both."""
    pair = byte_level(), sentencepiece()
    made = tokens.tokenize(world.records("shift", 70), *pair, SHORT)
    texts = [texts_of(tokenizer).texts for tokenizer in pair]
    return made, texts, spell(made, *texts)


def read(side, texts, row):
    """What the model has just read at each response position of a record, without spaces."""
    ids, first = side.row(row), side.prompt_lengths[row] - 1
    return [texts[token].replace(b" ", b"") for token in ids[first:-1].tolist()]


def test_edit_distances_against_the_plain_programme():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcé"), rng.integers(0, 8))) for _ in range(25)]
    words += words[:5]
    for ours in (words, [word.encode() for word in words]):
        found = edit_distances(ours, ours[3:])
        assert found.dtype == np.int32
        assert found.tolist() == [[levenshtein(a, b) for b in ours[3:]] for a in ours]


def test_bytes_are_compared_not_characters():
    assert edit_distances(["é"], ["e"]).tolist() == [[1]]
    assert edit_distances(["é".encode()], [b"e"]).tolist() == [[2]]
    assert edit_distances([b"\xff\x80"], [b"\x80"]).tolist() == [[1]]  # parts of characters are texts like others


def test_normalised_by_the_longer_text():
    costs = lexical_costs([b"king", b"", b"a"], [b"kings", b"", b"queen"])
    assert costs.dtype == np.float32
    assert costs == pytest.approx(np.array([[1 / 5, 1, 1], [1, 0, 1], [1, 1, 1]]))
    assert (normalised(np.zeros((2, 3)), np.zeros(2, int), np.zeros(3, int)) == 0).all()


def test_published_costs_are_zero_off_the_path():
    ours, theirs = ["Hello", "wor", "ld"], ["Hel", "lo", "world"]
    published, distances = lexical_costs(ours, theirs, published=True), edit_distances(ours, theirs)
    assert published[0, 2] == 0 < distances[0, 2]
    visited = {(i, j) for i, j in warping_path(distances).tolist()}
    visited |= {(i, j) for j, i in warping_path(distances.T).tolist()}
    assert {tuple(cell) for cell in np.argwhere(published).tolist()} <= visited


def test_spaces_mark_the_start_of_a_word_and_are_no_part_of_it():
    assert (bare(b" king"), bare(b"   "), bare(b"\n a")) == (b"king", b"", b"\na")


def test_what_a_record_holds(real):
    made, texts, found = real
    for row in range(0, made.rows, 7):
        ours, theirs = (read(side, of, row) for side, of in zip((made.student, made.teacher), texts, strict=True))
        n, m = len(ours), len(theirs)
        assert (n, m) == (made.student.response_counts[row], made.teacher.response_counts[row])
        stored = found.distances[found.starts[row] : found.starts[row + 1]].reshape(n, m)
        assert stored.tolist() == [[levenshtein(a, b) for b in theirs] for a in ours]
        for lengths, side, of in (
            (found.student_lengths, made.student, ours),
            (found.teacher_lengths, made.teacher, theirs),
        ):
            starts = side.response_starts
            assert lengths[starts[row] : starts[row + 1]].tolist() == list(map(len, of))


def test_pairs_are_the_students_positions_with_one_of_the_teacher(real):
    made, texts, found = real
    for row in range(made.rows):
        ours, theirs = (read(side, of, row) for side, of in zip((made.student, made.teacher), texts, strict=True))
        path = warping_path(edit_distances(theirs, ours)).tolist()  # the teacher is the first series
        partners = [[j for j, i in path if i == position] for position in range(len(ours))]
        expected = [(i, found_[0]) for i, found_ in enumerate(partners) if len(found_) == 1]
        assert list(zip(*(side.tolist() for side in found.pairs.row(row)), strict=True)) == expected
    share = len(found.pairs.student) / len(found.student_lengths)
    assert 0.5 < share < 1


def test_types_are_small(real):
    _, _, found = real
    assert (found.distances.dtype, found.student_lengths.dtype, found.teacher_lengths.dtype) == (np.uint8,) * 3
    assert (found.starts.dtype, found.pairs.starts.dtype) == (np.int64,) * 2
    assert (found.pairs.student.dtype, found.pairs.teacher.dtype) == (np.int32,) * 2


def test_long_tokens_take_two_bytes():
    def of(*ids):
        ids = np.array(ids, np.int32)
        return TokenSide(ids, np.array([0, len(ids)]), np.array([1], np.int32), np.arange(1, len(ids)).astype(np.int32))

    texts = [b"", b"x" * 300, b"yy", b"x" * 299]
    made = Tokens(of(1, 2, 0), of(3, 0), False, {"student": 4, "teacher": 4}, 0, 0)
    found = spell(made, texts, texts)
    assert found.distances.dtype == found.student_lengths.dtype == np.uint16
    assert found.distances.tolist() == [1, 299]
    assert (found.student_lengths.tolist(), found.teacher_lengths.tolist()) == ([300, 2], [299])


def test_one_tokenizer_reads_the_same():
    tokenizer = byte_level()
    made = tokens.tokenize(world.records("dev", 10), tokenizer, tokenizer, SHORT)
    found = spell(made, *(texts_of(tokenizer).texts,) * 2)
    assert (found.pairs.student == found.pairs.teacher).all()
    assert (np.diff(found.pairs.starts) == made.student.response_counts).all()
    for row, n in enumerate(made.student.response_counts):
        assert (np.diag(found.distances[found.starts[row] : found.starts[row + 1]].reshape(n, n)) == 0).all()


def test_one_to_one_leaves_out_who_has_two():
    whole, split = ["understand", "bookshop", "translation"], ["understand", "book", "shop", "translation"]
    assert one_to_one(edit_distances(whole, split)).tolist() == [[0, 0], [2, 3]]
    assert one_to_one(edit_distances(split, whole)).tolist() == [[0, 0], [1, 1], [2, 1], [3, 2]]


def test_a_teacher_is_needed():
    made = tokens.tokenize(world.records("dev", 2), byte_level(), None, SHORT)
    with pytest.raises(ValueError, match="not tokenised for a teacher"):
        spell(made, [], [])


def test_save_and_load(tmp_path, real):
    *_, found = real
    found.save(tmp_path / "a", tokens="abc")
    loaded = Spelling.load(tmp_path / "a/manifest.json", expected_tokens="abc")
    for name in ("distances", "starts", "student_lengths", "teacher_lengths"):
        assert np.array_equal(getattr(loaded, name), getattr(found, name))
        assert getattr(loaded, name).dtype == getattr(found, name).dtype
    for name in ("student", "teacher", "starts"):
        assert np.array_equal(getattr(loaded.pairs, name), getattr(found.pairs, name))
    assert loaded.rows == files.read_manifest(tmp_path / "a", "spelling")["rows"] == 70
    with pytest.raises(
        UserError, match=r"is stale: it is of the tokens abc, the run asks for xyz; .* --forcerun .*a/manifest.json"
    ):
        Spelling.load(tmp_path / "a", expected_tokens="xyz")
    (tmp_path / "a/spelling.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        Spelling.load(tmp_path / "a")


def test_the_same_every_time(real):
    made, texts, found = real
    again = spell(made, *texts)
    assert (again.distances == found.distances).all()
    assert (again.pairs.student == found.pairs.student).all()
