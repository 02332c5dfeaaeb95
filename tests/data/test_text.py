import json
import unicodedata

import pytest

from kdbench import models
from kdbench.data import records, text
from kdbench.data.records import Record
from kdbench.errors import UserError
from kdbench.settings import Text
from tests.data.tokenizers import HARD, REAL, byte_level, characters, sentencepiece
from tests.shared import SHARED, needs_shared

MARKER = "\n\n### Response:\n"


def count(tokenizer, string):
    return len(text.encode(tokenizer, [string])["input_ids"][0])


def record(instruction="Do it.", input="", output="Done.", prompt=None):
    return Record("set/1", instruction, input, prompt, (output,))


def test_short_template():
    assert text.prompt("Add.", "", "short") == "### Instruction:\nAdd.\n\n### Response:\n"
    assert text.prompt("Add.", "1 2", "short") == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"


@needs_shared
@pytest.mark.parametrize("name", ["dolly/dev", "dolly/valid", "self_inst/valid", "sinst/11_/valid", "vicuna/valid"])
def test_alpaca_template_is_that_of_the_published_data(name):
    with open(SHARED / "data" / f"{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert rows
    for row in rows:
        assert text.prompt(row["instruction"], row.get("input", ""), "alpaca") == row["prompt"]


def test_what_fits_is_not_touched():
    whole = record("Translate.  ", " the king sings ", "x  y")
    fitted = text.fit(whole, [byte_level(), sentencepiece()], Text(template="short"))
    assert fitted == (text.prompt("Translate.  ", " the king sings ", "short"), "x  y", True)


LONG = "the tall king follows a round stone and " * 60


def test_input_is_shortened_from_its_end_for_every_tokenizer():
    tokenizers = [byte_level(), sentencepiece(), characters()]
    limits = Text(template="short", max_prompt_tokens=120, max_tokens=200)
    prompt, _, complete = text.fit(record("Translate.", LONG), tokenizers, limits)
    kept = prompt.removeprefix("### Instruction:\nTranslate.\n\n### Input:\n").removesuffix(MARKER)
    assert prompt.endswith(MARKER)
    assert LONG.startswith(kept)
    assert kept == kept.strip()
    sizes = [count(tokenizer, prompt) for tokenizer in tokenizers]
    assert max(sizes) <= 120
    assert sizes[2] >= 118  # one token a character: the cut could not come later, but for white space
    assert complete


def test_instruction_is_shortened_when_there_is_no_input_left_to_cut():
    limits = Text(template="short", max_prompt_tokens=80, max_tokens=200)
    prompt = text.fit_prompt(record(LONG, "1 2"), [characters()], limits)
    kept = prompt.removeprefix("### Instruction:\n").removesuffix(MARKER)
    assert LONG.startswith(kept)
    assert 78 <= len(prompt) <= 80


def test_prompt_without_template_keeps_its_end():
    limits = Text(max_prompt_tokens=50, max_tokens=100)
    prompt = text.fit_prompt(record("", prompt=LONG + "so:\n"), [characters(), byte_level()], limits)
    assert (LONG + "so:\n").endswith(prompt)
    assert prompt == prompt.lstrip()
    assert 48 <= len(prompt) <= 50


def test_response_is_cut_at_its_end_and_then_is_not_complete():
    limits = Text(template="short", max_prompt_tokens=60, max_tokens=100)
    prompt, response, complete = text.fit(record(output=LONG), [characters(), byte_level()], limits)
    assert not complete
    assert LONG.startswith(response)
    assert response == response.rstrip()
    assert 98 <= len(prompt) + len(response) <= 100


def test_end_of_text_needs_its_place_too():
    prompt = text.prompt("Do it.", "", "short")
    limits = Text(template="short", max_prompt_tokens=60, max_tokens=len(prompt) + 5)
    assert text.fit(record(output="abcd"), [characters()], limits) == (prompt, "abcd", True)
    assert text.fit(record(output="abcde"), [characters()], limits) == (prompt, "abcde", False)
    assert text.fit(record(output="abcdef"), [characters()], limits) == (prompt, "abcde", False)


def test_template_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"set/1: nothing of its prompt fits text\.max_prompt_tokens \(8\)"):
        text.fit_prompt(record(), [byte_level()], Text(template="alpaca", max_prompt_tokens=8))


def test_no_room_for_the_response_is_an_error():
    limits = Text(template="short", max_prompt_tokens=200, max_tokens=39)
    with pytest.raises(
        UserError, match=r"set/1: its prompt leaves no room for a response within text\.max_tokens \(39\)"
    ):
        text.fit(record(), [byte_level(), characters()], limits)


@pytest.mark.parametrize(
    ("whole", "pieces"),
    [
        ("👨‍👩‍👧‍👦a", ["👨‍👩‍👧‍👦", "a"]),
        ("👍🏽👍", ["👍🏽", "👍"]),
        ("🇻🇳🇩🇪🇫🇷", ["🇻🇳", "🇩🇪", "🇫🇷"]),
        ("☀️x", ["☀️", "x"]),
        ("q̣̇z", ["q̣̇", "z"]),
    ],
)
def test_a_cut_never_splits_a_character(whole, pieces):
    limits = Text(template="short", max_prompt_tokens=200, max_tokens=1000)
    possible = {"".join(pieces[:length]) for length in range(1, len(pieces) + 1)}
    found = set()
    for length in range(16, 120):
        try:
            found.add(
                text.fit(
                    record(output=whole), [byte_level()], limits.model_copy(update={"max_tokens": length})
                ).response
            )
        except UserError:
            continue
    assert found == possible


@needs_shared
@pytest.mark.slow
def test_special_tokens_in_a_text_are_text():
    for name in REAL:
        tokenizer = models.load_tokenizer(SHARED / name)
        special = set(tokenizer.all_special_ids)
        for ids in text.encode(tokenizer, HARD)["input_ids"]:
            assert not special & set(ids), name
        # loaded by the project, a tokenizer does so without being asked
        assert text.encode(tokenizer, HARD)["input_ids"] == tokenizer(list(HARD), add_special_tokens=False)["input_ids"]


def test_special_tokens_of_a_trained_tokenizer_are_text_too(tmp_path):
    byte_level().save_pretrained(tmp_path)
    for tokenizer in (byte_level(), models.load_tokenizer(tmp_path)):
        assert tokenizer.eos_token_id not in text.encode(tokenizer, [f"a{models.END}b"])["input_ids"][0]


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dolly/dev", "sinst/11_/valid", "dialogsum/valid"])
def test_published_data_fit_all_published_tokenizers(name):
    tokenizers = [models.load_tokenizer(SHARED / folder) for folder in (REAL[0], REAL[1], REAL[4], REAL[5])]
    some = records.read_jsonl(SHARED / "data" / f"{name}.jsonl", rows=200)
    limits = Text()
    fitted = text.fit_all(some, tokenizers, limits)
    cut = 0
    for one, (prompt, response, complete) in zip(some, fitted, strict=True):
        assert prompt.endswith(MARKER)
        assert one.outputs[0].startswith(response)
        assert complete == (response == one.outputs[0])
        assert unicodedata.is_normalized("NFC", prompt)
        sizes = [count(tokenizer, prompt) for tokenizer in tokenizers]
        assert max(sizes) <= limits.max_prompt_tokens
        assert all(
            size + count(t, response) + complete <= limits.max_tokens for size, t in zip(sizes, tokenizers, strict=True)
        )
        if prompt != text.full_prompt(one, "alpaca"):
            cut += 1
            kept = prompt.split("### Input:\n")[1].removesuffix(MARKER)
            assert one.input.startswith(kept)
            assert kept
            assert max(sizes) > limits.max_prompt_tokens - 16  # nothing is cut for nothing
    assert cut > 0
    assert text.fit_prompts(some, tokenizers, limits) == [one.prompt for one in fitted]
