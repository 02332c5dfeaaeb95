import numpy as np
import pytest

from kdbench import files, models
from kdbench.data import records, tokens, world
from kdbench.data.records import Record
from kdbench.data.text import full_prompt
from kdbench.errors import UserError
from kdbench.settings import Text
from tests.data.tokenizers import HARD, REAL, byte_level, characters, sentencepiece
from tests.shared import SHARED, needs_shared

SHORT = Text(template="short", max_prompt_tokens=160, max_tokens=256)
COLUMNS = ("ids", "starts", "prompt_lengths", "ends")


def hard_records():
    return [Record(f"hard/{row}", "Repeat.", text, None, (text,)) for row, text in enumerate(HARD, 1)]


def read_back(side, tokenizer, row):
    """Prompt and response, by the tokenizer's own decoding, and whether an end of text follows."""
    ids = side.row(row).tolist()
    size = int(side.prompt_lengths[row])
    asked, said = ids[:size], ids[size:]
    complete = said[-1] == tokenizer.eos_token_id
    decode = lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False)  # noqa: E731
    return decode(asked), decode(said[:-1] if complete else said), complete


def check(made, some, student, teacher, limits):
    """Both sides decode to the same text, which is the records' as far as it fits."""
    cut = 0
    for row, record in enumerate(some):
        one, other = (read_back(side, t, row) for side, t in ((made.student, student), (made.teacher, teacher)))
        assert one == other
        prompt, response, complete = one
        assert prompt.endswith("### Response:\n")
        assert response == record.outputs[0] or not complete  # a whole response may lack the room for its end of text
        assert record.outputs[0].startswith(response)
        cut += prompt != full_prompt(record, limits.template)
        for side in (made.student, made.teacher):
            ends = side.ends[side.response_starts[row] : side.response_starts[row + 1]]
            assert ends[-1] == len(response.encode()) + complete
            assert (np.diff(ends) >= 0).all()
            assert len(ends) == side.response_counts[row]
            assert side.lengths[row] == len(side.row(row)) <= limits.max_tokens
            assert side.prompt_lengths[row] <= limits.max_prompt_tokens
    assert cut == made.prompts_cut


def test_types_and_columns():
    made = tokens.tokenize(world.records("train", 20), byte_level(), sentencepiece(), SHORT)
    for side in (made.student, made.teacher):
        assert [getattr(side, column).dtype for column in COLUMNS] == [np.int32, np.int64, np.int32, np.int32]
        assert side.rows == made.rows == 20
        assert side.starts[0] == 0
        assert side.starts[-1] == len(side.ids)
        assert side.response_starts[-1] == len(side.ends)
    assert made.vocabulary == {"student": len(byte_level()), "teacher": len(sentencepiece())}
    assert not made.same_tokenizer


@pytest.mark.parametrize("limits", [SHORT, Text(template="short", max_prompt_tokens=60, max_tokens=90)])
@pytest.mark.parametrize("teacher", [sentencepiece, characters])
def test_both_sides_are_the_same_text(teacher, limits):
    some = world.records("shift", 60)
    if teacher is sentencepiece:
        some += hard_records()
    made = tokens.tokenize(some, byte_level(), teacher(), limits)
    check(made, some, byte_level(), teacher(), limits)
    if limits is not SHORT:
        assert made.prompts_cut > 5


def test_ends_of_a_response():
    one = Record("x/1", "Sing.", "", None, ("é👍",))
    side = tokens.tokenize([one], byte_level(), None, SHORT).student
    assert side.ends.tolist() == [1, 2, 3, 4, 5, 6, 7]  # seven bytes that no merge joins, then the end of text
    assert len(side.ends) == 6 + 1


def test_a_cut_response_has_no_end_of_text():
    long = Record("x/1", "Sing.", "", None, ("la la " * 200,))
    made = tokens.tokenize([long], byte_level(), None, SHORT)
    assert made.responses_cut == 1
    assert byte_level().eos_token_id not in made.student.ids


def test_one_tokenizer_for_both_makes_one_side():
    made = tokens.tokenize(world.records("dev", 5), byte_level(), byte_level(), SHORT)
    assert made.same_tokenizer
    assert made.teacher is made.student


def test_without_a_teacher():
    made = tokens.tokenize(world.records("dev", 5), byte_level(), None, SHORT)
    assert (made.teacher, made.same_tokenizer) == (None, False)
    assert list(made.vocabulary) == ["student"]


def test_same_vocabulary():
    assert tokens.same_vocabulary(byte_level(), byte_level())
    assert not tokens.same_vocabulary(byte_level(), byte_level(600))


@pytest.mark.parametrize("teacher", [sentencepiece, byte_level, lambda: None])
def test_save_and_load(tmp_path, teacher):
    made = tokens.tokenize(world.records("dev", 30), byte_level(), teacher(), SHORT)
    made.save(tmp_path / "t", records="abc")
    loaded = tokens.Tokens.load(tmp_path / "t" / "manifest.json")
    for name in ("student", "teacher"):
        one, other = getattr(made, name), getattr(loaded, name)
        assert (one is None) == (other is None)
        for column in COLUMNS if one is not None else ():
            assert getattr(other, column).dtype == getattr(one, column).dtype
            assert (getattr(other, column) == getattr(one, column)).all()
    facts = ("same_tokenizer", "vocabulary", "prompts_cut", "responses_cut")
    assert [getattr(loaded, fact) for fact in facts] == [getattr(made, fact) for fact in facts]
    if made.same_tokenizer:
        assert loaded.teacher is loaded.student
    manifest = files.read_manifest(tmp_path / "t", "tokens")
    assert (manifest["rows"], manifest["records"]) == (30, "abc")


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        made = tokens.tokenize(world.records("dev", 30), byte_level(), sentencepiece(), SHORT)
        made.save(tmp_path / name)
    assert files.read_manifest(tmp_path / "a", "tokens") == files.read_manifest(tmp_path / "b", "tokens")


def test_loaded_columns_can_be_written_to_without_changing_the_file(tmp_path):
    tokens.tokenize(world.records("dev", 5), byte_level(), None, SHORT).save(tmp_path / "t")
    tokens.Tokens.load(tmp_path / "t").student.ids[:] = 0
    assert tokens.Tokens.load(tmp_path / "t").student.ids.any()


def test_text_that_a_tokenizer_changes_is_an_error_that_names_record_and_side():
    some = [Record("x/1", "a", "", None, ("b",)), Record("x/2", "a", "", None, ("b▁c",))]
    with pytest.raises(
        UserError, match=r"x/2: the teacher's tokenizer does not give its response back: at byte 2 the text has"
    ):
        tokens.tokenize(some, byte_level(), sentencepiece(), SHORT)
    some = [Record("x/1", "a", "▁", None, ("b",))]
    with pytest.raises(UserError, match=r"x/1: the student's tokenizer does not give its prompt back"):
        tokens.tokenize(some, sentencepiece(), byte_level(), SHORT)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [(REAL[0], REAL[1]), (REAL[4], REAL[5]), (REAL[6], REAL[3])])
def test_published_data_in_published_tokenizers(student, teacher):
    tokenizers = [models.load_tokenizer(SHARED / folder) for folder in (student, teacher)]
    limits = Text()
    some = hard_records()
    for name in ("dolly/dev", "sinst/11_/valid", "dialogsum/valid"):
        some += records.read_jsonl(SHARED / "data" / f"{name}.jsonl", rows=120, name=name)
    made = tokens.tokenize(some, *tokenizers, limits)
    assert made.prompts_cut > 20
    check(made, some, *tokenizers, limits)


@needs_shared
@pytest.mark.slow
def test_qwen_versions_give_one_text_but_are_two_vocabularies():
    qwens = [models.load_tokenizer(SHARED / folder) for folder in REAL[1:3]]
    assert not tokens.same_vocabulary(*qwens)
    assert tokens.same_vocabulary(qwens[0], qwens[0])
