import pytest

from kdbench import models
from kdbench.data.spans import Spans
from tests.data.tokenizers import HARD, REAL, byte_level, characters, sentencepiece
from tests.shared import SHARED, needs_shared


def texts_of_tokens(spans, text):
    (found,) = spans.encode([text])
    assert found.difference is None
    whole, start, pieces = text.encode(), 0, []
    for end in found.ends.tolist():
        assert end >= start
        pieces.append(whole[start:end])
        start = end
    assert start == len(whole)
    return pieces


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_pieces_of_hard_texts_are_what_the_tokens_say(kind):
    spans = Spans(kind())
    for text in HARD:
        texts_of_tokens(spans, text)


def test_bytes_of_one_character():
    for kind in (byte_level, sentencepiece):
        pieces = texts_of_tokens(Spans(kind()), "a😀")
        assert pieces[-4:] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


def test_space_before_the_text_is_not_part_of_it():
    tokenizer = sentencepiece()
    assert texts_of_tokens(Spans(tokenizer), "king")[0].startswith(b"k")
    (found,) = Spans(tokenizer).encode(["\nking"])  # nothing joins the space and a newline
    assert tokenizer.convert_ids_to_tokens(found.ids.tolist())[:2] == ["▁", "<0x0A>"]
    assert found.ends[:2].tolist() == [0, 1]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, characters])
def test_an_empty_text_has_no_tokens_at_all(kind):
    (found,) = Spans(kind()).encode([""])
    assert (found.ids.tolist(), found.ends.tolist(), found.difference) == ([], [], None)


def test_tokens_that_only_tell_their_characters():
    assert texts_of_tokens(Spans(characters()), "né 😀") == [b"n", "é".encode(), b" ", "😀".encode()]


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (sentencepiece, "a▁b", "at byte 2 the text has '▁b', its tokens ' b'"),
        (characters, "aß", "at byte 1 the text has 'ß', its tokens '<unk>'"),
    ],
)
def test_what_a_tokenizer_does_not_give_back(kind, text, shown):
    assert Spans(kind()).encode(["fine", text])[1].difference == shown
    assert Spans(kind()).encode(["fine", text])[0].difference is None


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_published_tokenizers(name):
    tokenizer = models.load_tokenizer(SHARED / name)
    spans = Spans(tokenizer)
    for text in HARD:
        pieces = texts_of_tokens(spans, text)
        (found,) = spans.encode([text])
        assert tokenizer.decode(found.ids.tolist(), clean_up_tokenization_spaces=False) == text
        # the library's own offsets agree wherever a token holds whole characters and begins with none of the text's spaces
        offsets = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0]
        for piece, (start, end) in zip(pieces, offsets, strict=True):
            if text[start:end].encode() != piece:
                assert piece.startswith(b" ") or len(piece) < len(text[start:end].encode()) or not piece


@needs_shared
def test_llama_loses_a_space_at_the_beginning_and_that_is_seen():
    spans = Spans(models.load_tokenizer(SHARED / "tokenizers/llama2-7b"))
    assert spans.encode([" leading"])[0].difference is not None
    assert spans.encode(["leading"])[0].difference is None


@needs_shared
def test_qwen_composes_accents_and_that_is_seen():
    spans = Spans(models.load_tokenizer(SHARED / "tokenizers/qwen1.5-1.8b"))
    assert spans.encode(["e\u0301"])[0].difference is not None
