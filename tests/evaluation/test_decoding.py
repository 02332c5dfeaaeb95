"""Many answers at a time are what each of them would be alone."""

import pytest
import torch
from scipy.stats import chi2

from kdbench import models
from kdbench.errors import UserError
from kdbench.evaluation import slots
from kdbench.evaluation.decoding import BatchWriter, Ngrams, draw, noise
from kdbench.settings import Decoding, Lora
from tests import tiny

WORDS, END = 40, 0
PROMPTS = [
    [1 + (7 * row + 3 * place * (row + 1)) % (WORDS - 1) for place in range(length)]
    for row, length in enumerate([3, 24, 1, 14, 7, 2, 19, 5, 22, 1])
]
NAMES = [f"set/{row}" for row in range(len(PROMPTS))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Words:
    """As much of a tokenizer as writing needs."""

    def __init__(self, size=WORDS, end=END):
        self.size, self.eos_token_id = size, end

    def __len__(self):
        return self.size


def adapted():
    """A LLaMA with an adapter that takes part."""
    model = models.add_adapters(tiny.llama(), Lora(rank=2, alpha=4.0)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model


MODELS = {
    "gpt2": tiny.gpt2,
    "qwen2": tiny.qwen2,
    "llama": tiny.llama,
    "mistral": tiny.mistral,
    "opt": tiny.opt,
    "lora": adapted,
}


def greedy(**settings):
    return Decoding(temperature=0.0, max_new_tokens=20, **settings)


def write(model, decoding, batch_size, seeds=(1,), end=END):
    return BatchWriter(model, Words(end=end), batch_size).write(PROMPTS, NAMES, decoding, seeds, lambda: None)


def alone(model, prompt, **options):
    """What transformers' `generate` writes to one prompt: 20 tokens, none of which ends it."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt])
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=WORDS, pad_token_id=END, **options)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, len(prompt) :].tolist()


def ending(answers):
    """A token that ends answers early, late and never; and the answers up to it."""
    ends = {
        end: [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in answers]
        for end in range(WORDS)
    }
    return max(ends.items(), key=lambda found: len({len(tokens) for tokens in found[1]}))


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_answers_are_those_of_transformers_token_for_token(kind):
    model = MODELS[kind]()
    end, expected = ending([alone(model, prompt) for prompt in PROMPTS])
    assert len({len(tokens) for tokens in expected}) > 2  # places are freed, and taken by others
    for batch_size in (1, 4, 64):
        assert [of for (of,) in write(model, greedy(), batch_size, end=end)] == expected


def test_buffers_are_moved_when_they_are_full(monkeypatch):
    """With room for two steps only between two moves."""
    monkeypatch.setattr(slots, "_SLACK", 2)
    moves = []
    move = slots.Slots._move
    monkeypatch.setattr(slots.Slots, "_move", lambda self, end: moves.append(end) or move(self, end))
    model = tiny.mistral()
    end, expected = ending([alone(model, prompt) for prompt in PROMPTS])
    assert [of for (of,) in write(model, greedy(), 3, end=end)] == expected
    assert moves


@pytest.mark.parametrize("size", [2, 3])
def test_ngrams_are_forbidden_as_transformers_does(size):
    model = tiny.llama()
    end, expected = ending([alone(model, prompt, no_repeat_ngram_size=size) for prompt in PROMPTS])
    found = [of for (of,) in write(model, greedy(no_repeat_ngram_size=size), 4, end=end)]
    assert found == expected
    assert found != [of for (of,) in write(model, greedy(), 4, end=end)]


def test_ngrams_of_a_text():
    grams = Ngrams(3, [1, 2, 3, 1, 2])
    assert grams.forbidden() == [3]
    grams.append(4)
    assert grams.forbidden() == []
    for token in (9, 1, 2):
        grams.append(token)
    assert sorted(grams.forbidden()) == [3, 4]
    assert Ngrams(3, [1]).forbidden() == []


def test_a_prompt_is_read_once_for_all_seeds_and_logits_are_those_of_the_last_token():
    model, read = tiny.gpt2(), []
    model.register_forward_hook(
        lambda _, __, given, output: read.append((given["attention_mask"], given["input_ids"], output.logits)),
        with_kwargs=True,
    )
    write(model, Decoding(max_new_tokens=6), 5, seeds=(1, 2, 3, 4, 5))
    prefills = [(mask, ids) for mask, ids, _ in read if ids.shape == mask.shape]
    assert sum(mask.sum().item() for mask, _ in prefills) == sum(map(len, PROMPTS))
    assert all(logits.shape[1] == 1 for *_, logits in read)
    steps = [ids for mask, ids, _ in read if ids.shape != mask.shape]
    assert {ids.shape[1] for ids in steps} == {1}
    assert max(ids.shape[0] for ids in steps) == 5


def test_freed_places_are_taken_and_nothing_is_padded_to_the_longest_of_all():
    """Steps are as many as a full batch needs, and read as many columns as the sequences of the moment have."""
    model, widths, rows = tiny.mistral(), [], []

    def seen(_, __, given):
        if given["input_ids"].shape != given["attention_mask"].shape:
            widths.append(given["attention_mask"].shape[1])
            rows.append(len(given["input_ids"]))
            assert given["attention_mask"][:, 0].any()  # the first column is somebody's
            assert given["attention_mask"][:, -1].all()

    model.register_forward_pre_hook(seen, with_kwargs=True)
    answers = write(model, greedy(), 4)
    tokens = sum(len(of) - 1 for (of,) in answers)  # the first follows from the prefill
    assert sum(rows) == tokens  # no step computes an answer that has ended
    assert rows == sorted(rows, reverse=True)  # full until nobody waits any more
    assert widths[-1] < max(widths)


def test_layers_that_keep_other_states_are_refused():
    model = tiny.qwen2()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(
        UserError, match=r"^qwen2: generation does not support its layers of the kind linear_attention$"
    ):
        BatchWriter(model, Words(), 2)


def chi_square(found: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Share of the chi-square distribution below what is found: above 0.999 the probabilities are to be doubted."""
    kept = probabilities > 0
    assert found[~kept].sum() == 0
    expected = found.sum() * probabilities[kept].double()
    assert expected.min() > 5
    statistic = ((found[kept] - expected) ** 2 / expected).sum().item()
    return float(chi2.cdf(statistic, kept.sum().item() - 1))


@pytest.mark.parametrize("size", [40, 600])  # within a block, and over several
def test_draws_are_of_the_softmax(size):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(size, generator=generator) * 1.3
    logits[[3, 17, size - 1]] = -torch.inf
    numbers = torch.cat([torch.from_numpy(noise(1, f"set/{row}", 500)) for row in range(200)])
    found = sum(
        torch.bincount(draw(logits.expand(len(part), -1), part), minlength=size) for part in numbers.split(5000)
    )
    rare = logits.softmax(-1) < 1e-4  # together, lest too few are expected of each
    probabilities = logits.softmax(-1).double()
    grouped = torch.cat([probabilities[~rare], probabilities[rare].sum()[None]])
    assert chi_square(torch.cat([found[~rare], found[rare].sum()[None]]), grouped) < 0.999
    assert found[[3, 17, size - 1]].sum() == 0


def test_the_ends_of_the_unit_interval_draw_what_may_be_drawn():
    logits = torch.full((2, 152_064), -torch.inf)
    logits[:, 1000:1500] = torch.linspace(-30, 0, 500)
    below_one = 1 - 2.0**-53
    assert draw(logits, torch.tensor([0.0, below_one], dtype=torch.float64)).tolist() == [1000, 1499]
    alone = torch.full((2, 300), -torch.inf)
    alone[:, 7] = 3.0
    assert draw(alone, torch.tensor([0.0, below_one], dtype=torch.float64)).tolist() == [7, 7]


def test_sequences_have_the_distribution_of_plain_sampling():
    """All answers of two tokens of a small model, against the products of its own probabilities."""
    words = 5
    model = tiny.qwen2(vocabulary=words)
    prompt = [1, 2, 3]

    def after(tokens):
        with torch.no_grad():
            return (model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double() / 1.5).softmax(-1)

    first = after([])
    probabilities = torch.zeros(words, words, dtype=torch.float64)
    probabilities[END, 0] = first[END]  # it ends at once
    for token in range(1, words):
        probabilities[token] = first[token] * after([token])
    decoding = Decoding(temperature=1.5, max_new_tokens=2)
    seeds = list(range(4000))
    writer = BatchWriter(model, Words(words), 1000)
    (answers,) = writer.write([prompt], ["set/1"], decoding, seeds, lambda: None)
    found = torch.zeros(words, words)
    for tokens in answers:
        found[tokens[0], tokens[1] if len(tokens) > 1 else 0] += 1
    assert chi_square(found.flatten(), probabilities.flatten()) < 0.999


def test_noise_is_of_the_seed_and_the_record():
    assert (
        noise(1, "a", 3) == noise(1, "a", 8)[:3]
    ).all()  # the limit of an answer's length does not change its beginning
    assert len({tuple(noise(seed, name, 4)) for seed in (1, 2) for name in ("a", "b")}) == 4
