"""Texts as tensors, against the published data set and collator (group collate).

Departures of ours, each tested below: batches are padded to their longest text, not to a fixed length; a text that is too long is cut as
text, the same for both models and never in the response marker, where the published code cuts each model's tokens at their ends.
"""

import pytest

from kdbench.data import batches
from kdbench.data.text import encode, full_prompt
from kdbench.evaluation.decoding import BatchWriter
from kdbench.evaluation.generation import generate
from kdbench.settings import Decoding
from tests.golden import golden, real

MARKER = "\n\n### Response:\n"
SIDES = ("student", "teacher")


@pytest.fixture(autouse=True)
def _real_texts():
    real.require()


def _sizes(case, of):
    """Prompt and response of each row in tokens, before any cut; the end of text is part of the response."""
    chosen = [real.records()[row] for row in case["rows"]]
    texts = [full_prompt(record, "alpaca") for record in chosen], [record.outputs[0] for record in chosen]
    prompts, responses = (encode(real.tokenizer(case[of]), part)["input_ids"] for part in texts)
    return [(len(prompt), len(response) + 1) for prompt, response in zip(prompts, responses, strict=True)]


def _fits(case) -> list[bool]:
    """Whether a row is cut for neither model."""
    return [
        all(p <= case["max_prompt_length"] and p + r <= case["max_length"] for p, r in both)
        for both in zip(*(_sizes(case, of) for of in SIDES), strict=True)
    ]


def _tokens(case):
    return real.tokens(case["rows"], case["student"], case["teacher"], real.text(case))


@pytest.mark.parametrize("case", golden.cases("collate"))
def test_ids_and_labels_of_texts_that_fit(case):
    tokens, fits = _tokens(case), _fits(case)
    assert any(fits)
    assert tokens.prompts_cut + tokens.responses_cut == fits.count(False)
    batch = batches.collate(tokens, range(len(fits)), teacher=True)
    for of in SIDES:
        side = getattr(batch, of)
        texts = side.input_ids.split(side.lengths)
        for row in (row for row, whole in enumerate(fits) if whole):
            want = case[f"{of}_tensors"]["rows"][row]
            assert side.lengths[row] == want["length"] + 1
            assert texts[row][:-1].tolist() == want["input_ids"]
            labels = side.targets[side.sequence == row]
            assert labels.tolist() == want["labels"]
            assert len(labels) == want["label_count"] == side.counts[row]
            assert (side.positions[side.sequence == row] - sum(side.lengths[:row])).tolist() == list(
                range(want["label_first"], want["label_first"] + want["label_count"])
            )


@pytest.mark.parametrize("case", golden.cases("collate"))
def test_padding_departs(case):
    """Published: every batch is `max_length` wide, padded with an id of the tokenizer. Ours: its texts, one after the other."""
    batch = batches.collate(_tokens(case), range(len(case["rows"])), teacher=True)
    for of in SIDES:
        side = getattr(batch, of)
        assert case[f"{of}_tensors"]["shape"] == [len(case["rows"]), case["max_length"]]
        assert side.input_ids.shape == side.position_ids.shape == (sum(side.lengths),)
        assert side.position_ids.tolist() == [place for length in side.lengths for place in range(length)]


@pytest.mark.parametrize("case", golden.cases("collate"))
def test_cuts_depart(case):
    """Published: each model's tokens end at the limit. Ours: both models read one text, with its response marker."""
    tokens, fits = _tokens(case), _fits(case)
    for row in (row for row, whole in enumerate(fits) if not whole):
        read = []
        for of in SIDES:
            reader, column = real.tokenizer(case[of]), getattr(tokens, of)
            prompt, response = _sizes(case, of)[row]
            kept = min(prompt, case["max_prompt_length"])
            total = min(kept + response, case["max_length"])
            want = case[f"{of}_tensors"]["rows"][row]
            assert (want["length"], want["label_first"], want["label_count"]) == (total - 1, kept - 1, total - kept)
            marked = reader.decode([*want["input_ids"], want["labels"][-1]][:kept]).endswith(MARKER)
            assert marked == (prompt <= case["max_prompt_length"])
            ids = column.row(row)
            assert len(ids) <= case["max_length"]
            prompt = reader.decode(ids[: column.prompt_lengths[row]])
            assert prompt.endswith(MARKER)
            read.append((prompt, column.ends[column.response_starts[row + 1] - 1]))
        assert read[0] == read[1]  # the same prompt, and as many bytes of the same response


@pytest.mark.parametrize("case", golden.cases("collate"))
def test_prompts_of_generation_are_padded_on_the_left(case):
    """Published: to `max_prompt_length`, the end-of-text token first. Ours: to the longest, likewise; cut prompts keep their marker."""
    from transformers import GPT2Config, GPT2LMHeadModel

    reader, chosen = real.tokenizer(case["student"]), [real.records()[row] for row in case["rows"]]
    sizes = {"vocab_size": len(reader), "n_positions": case["max_prompt_length"] + 1, "bos_token_id": None}
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, eos_token_id=reader.eos_token_id, **sizes)
    model, seen = GPT2LMHeadModel(config).eval(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    writer = BatchWriter(model, reader, len(chosen))
    generate(writer, chosen, Decoding(temperature=0.0, max_new_tokens=1), real.text(case), [0])
    shown = {
        tuple(ids[mask.bool()].tolist()): (ids, mask)
        for ids, mask in zip(seen[0]["input_ids"], seen[0]["attention_mask"], strict=True)
    }
    for row, (prompt, _) in enumerate(_sizes(case, "student")):
        last, kept = case["generation"]["input_ids"][row], case["generation"]["prompt_lengths"][row]
        assert kept == min(prompt, case["max_prompt_length"])
        if prompt > case["max_prompt_length"]:
            assert not reader.decode(last).endswith(MARKER[-10:])
            continue
        ids = encode(reader, [full_prompt(chosen[row], "alpaca")])["input_ids"][0]
        padded, mask = shown[tuple(ids)]
        assert padded[-len(last) :].tolist() == last
        assert mask.sum() == kept
        assert (mask.diff() >= 0).all()
        assert (padded[mask == 0] == reader.eos_token_id).all()
    assert all(reader.decode(list(ids)).endswith(MARKER) for ids in shown)
