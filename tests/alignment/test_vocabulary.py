import numpy as np
import pytest
import torch

from kdbench import files, models
from kdbench.alignment import vocabulary
from kdbench.alignment.spelling import bare, edit_distances
from kdbench.alignment.vocabulary import BYTE, PIECE, SPECIAL, Texts, closest, relate, texts_of
from kdbench.errors import UserError
from tests.data.tokenizers import byte_level, characters, sentencepiece
from tests.shared import SHARED, needs_shared


def texts(*tokens, end=0, byte=(), special=()):
    """A vocabulary of these bytes; the end of text is special in any case."""
    kinds = np.full(len(tokens), PIECE, np.int8)
    kinds[list(byte)] = BYTE
    kinds[[end, *special]] = SPECIAL
    return Texts(list(tokens), kinds, end)


def nearest(student, teacher):
    found = relate(student, teacher)
    return [student.texts[token] for token in found.nearest.tolist()], found.distance.tolist()


def test_the_same_bytes_then_the_same_word_then_the_least_edits():
    student = texts(b"</s>", b"king", b" king", b" queens", b"horse")
    teacher = texts(b"<end>", b" king", b"king", b"queens", b"   horse", b"hors", b" kin")
    assert nearest(student, teacher) == (
        [b"</s>", b" king", b"king", b" queens", b"horse", b"horse", b" king"],
        [0, 0, 0, 0, 0, 1, 1],
    )


def test_ties_go_to_the_lowest_id():
    student = texts(b"</s>", b"cat", b"bat", b" bat", b"rat")
    assert nearest(student, texts(b"<end>", b"hat", b" hat")) == ([b"</s>", b"cat", b"cat"], [0, 1, 1])
    student = texts(b"</s>", b" cat", b"bat", b"cat")
    assert nearest(student, texts(b"<end>", b"hat", b" hat")) == ([b"</s>", b"cat", b" cat"], [0, 1, 1])


def test_nothing_but_the_end_of_text_is_mapped_to_the_end_of_text():
    student = texts(b"<|endoftext|>", b"x")
    teacher = texts(b"</s>", b"<|endoftext|>", b"<|im_end|>", special=[2])
    assert nearest(student, teacher)[0] == [b"<|endoftext|>", b"x", b"x"]
    assert relate(student, teacher).shared.tolist() == [[0, 0]]


def test_kinds_of_one_text_are_kept_apart():
    student = texts(b"</s>", b"A", b"\n", b"A", b"<s>", b"<s>", byte=[1, 2], special=[4])
    found = relate(student, texts(b"<end>", b"A", b"\n", b"<s>", b"A", b"<s>", special=[3], byte=[4]))
    assert found.nearest.tolist() == [0, 3, 2, 4, 1, 5]
    assert found.shared.tolist() == [[0, 0], [1, 4], [2, 2], [3, 1], [4, 3], [5, 5]]


def test_no_token_is_shared_twice():
    """A teacher of SentencePiece has some bytes as a piece and as a byte token; the piece is what it writes."""
    student = texts(b"</s>", b"A", b"\n")
    found = relate(student, texts(b"<end>", b"A", b"\n", b"A", byte=[1, 2]))
    assert found.nearest.tolist() == [0, 1, 2, 1]
    assert found.shared.tolist() == [[0, 0], [1, 3], [2, 2]]


def test_beginnings_of_words():
    found = relate(texts(b"</s>", b" a", b"a", b"\nx", b"", b"\ta"), texts(b"a", b"<|end|>", end=1))
    assert found.student_begins_word.tolist() == [True, True, False, True, False, True]
    assert found.teacher_begins_word.tolist() == [False, True]


def test_against_the_plain_search():
    rng = np.random.default_rng(0)
    letters = [b"a", b"b", b"c", b" ", b"\xc3"]

    def some(count):
        drawn = [b"".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(count)]
        return list(dict.fromkeys(drawn))

    for _ in range(5):
        asked, choice = some(80), some(int(rng.integers(1, 60)))
        places, distances = closest(asked, choice)
        every = edit_distances([bare(text) for text in asked], [bare(text) for text in choice])
        assert distances.tolist() == every.min(1).tolist()
        for text, place, row in zip(asked, places.tolist(), every, strict=True):
            word = bare(choice[row.argmin()])
            alike = [at for at, other in enumerate(choice) if bare(other) == word]
            marked = [at for at in alike if choice[at].startswith(b" ") == text.startswith(b" ")]
            assert place == (marked or alike)[0]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, characters])
def test_one_tokenizer_is_mapped_to_itself(kind):
    of = texts_of(kind())
    found = relate(of, of)
    everyone = torch.arange(len(of.texts))
    assert torch.equal(found.nearest, everyone)
    assert torch.equal(found.shared, torch.stack([everyone, everyone], 1))
    assert not found.distance.any()
    assert torch.equal(found.student_begins_word, found.teacher_begins_word)


def test_real_tokenizers():
    student, teacher = byte_level(), sentencepiece()
    ours, theirs = texts_of(student), texts_of(teacher)
    found = relate(ours, theirs)
    assert (len(found.nearest), len(found.distance), len(found.teacher_begins_word)) == (len(teacher),) * 3
    assert len(found.student_begins_word) == len(student)
    assert [found.nearest.dtype, found.distance.dtype, found.shared.dtype] == [torch.int64] * 3
    assert found.student_begins_word.dtype == found.teacher_begins_word.dtype == torch.bool
    assert found.nearest[teacher.eos_token_id] == student.eos_token_id
    a, b = found.shared.T.tolist()
    assert len(set(a)) == len(a) == len(set(b))
    assert a == sorted(a)
    ends = (student.eos_token_id, teacher.eos_token_id)
    for i, j in zip(a, b, strict=True):
        assert (i, j) == ends or ours.texts[i] == theirs.texts[j]
        assert found.distance[j] == 0
    assert set(ours.texts) & {text for text, kind in zip(theirs.texts, theirs.kinds, strict=True) if kind == PIECE} == {
        ours.texts[i] for i, j in zip(a, b, strict=True) if theirs.kinds[j] == PIECE and (i, j) != ends
    }
    space = student.encode(" the", add_special_tokens=False)[0]
    assert found.student_begins_word[space]
    assert not found.student_begins_word[student.encode("the", add_special_tokens=False)[0]]


def test_tokens_whose_names_tell_no_bytes_are_decoded():
    of = texts_of(characters())
    assert "é".encode() in of.texts
    assert b" " in of.texts
    assert of.kinds[characters().eos_token_id] == SPECIAL


def test_a_fingerprint_names_the_content():
    of = texts(b"</s>", b"a", b"b")
    assert of.fingerprint == texts(b"</s>", b"a", b"b").fingerprint
    others = [
        texts(b"</s>", b"b", b"a"),
        texts(b"</s>", b"a", b"b", byte=[2]),
        texts(b"</s>", b"a", b"b", end=1, special=[0]),
    ]
    assert len({each.fingerprint for each in (of, *others)}) == 4


def test_save_and_load(tmp_path):
    found = relate(texts_of(byte_level()), texts_of(sentencepiece()))
    made_of = {"student": "abc", "teacher": "xyz"}
    vocabulary.save(tmp_path / "a", found, tokenizers=made_of)
    loaded = vocabulary.load(tmp_path / "a/manifest.json", made_of)
    for name, value in vars(found).items():
        assert torch.equal(getattr(loaded, name), value)
        assert getattr(loaded, name).dtype == value.dtype
    assert files.read_manifest(tmp_path / "a", "vocabulary")["tokenizers"] == made_of
    with pytest.raises(UserError, match=r"is stale: it is of the tokenizers .* --forcerun .*a/manifest.json"):
        vocabulary.load(tmp_path / "a", {"student": "abc", "teacher": "other"})
    (tmp_path / "a/vocabulary.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        vocabulary.load(tmp_path / "a")


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "shared"),
    # distillation.md, section 5: tokens that two published tokenizers share; for GPT2 and Qwen1.5 the two ends of text have one name
    [("gpt2", "qwen1.5-1.8b", 42_256 + 1), ("tinyllama-1.1b-3t", "mistral-7b-v0.1", 24_184)],
)
def test_published_tokenizers(student, teacher, shared):
    ours, theirs = (texts_of(models.load_tokenizer(SHARED / "tokenizers" / name)) for name in (student, teacher))
    found = relate(ours, theirs)
    assert len(found.shared) == shared
    assert found.nearest[theirs.end] == ours.end
    rng = np.random.default_rng(0)
    pieces = np.flatnonzero(ours.kinds == PIECE)
    stems = [bare(ours.texts[token]) for token in pieces]
    asked = rng.choice(np.flatnonzero(theirs.kinds == PIECE), 60, replace=False)
    every = edit_distances([bare(theirs.texts[token]) for token in asked], stems)
    assert found.distance[asked].tolist() == every.min(1).tolist()
    assert [bare(ours.texts[token]) for token in found.nearest[asked]] == [stems[row.argmin()] for row in every]
