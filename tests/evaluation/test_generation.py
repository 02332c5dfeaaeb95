"""Answers depend on the model, the prompt and the seed, and on nothing else."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from kdbench import models
from kdbench.data.records import Record, clean_output
from kdbench.data.text import encode, full_prompt
from kdbench.errors import UserError
from kdbench.evaluation.decoding import BatchWriter
from kdbench.evaluation.generation import answers, generate
from kdbench.settings import Decoding, Lora, Text
from tests.data.tokenizers import HARD, byte_level, characters, sentencepiece
from tests.shared import SHARED, needs_shared

GREEDY = Decoding(temperature=0.0, max_new_tokens=12)
SAMPLED = Decoding(temperature=1.0, max_new_tokens=12)
LONG = Decoding(temperature=0.0, max_new_tokens=150)
TEXT = Text(template="short", max_prompt_tokens=60, max_tokens=90)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(kind: str, tokenizer, positions: int = 128, rows: int | None = None, ends: float = 1.0):
    """A random model; the larger `ends`, the larger the logit of the end of text, whatever its sign."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions},
        "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "max_position_embeddings": positions},
    }  # fmt: skip
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        kind, vocab_size=rows or len(tokenizer), initializer_range=0.35, use_cache=False, **sizes[kind]
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= ends
    return model


def record(number: int, words: int) -> Record:
    text = " ".join(["name", "all", "rivers", "of", "Kelmor"][place % 5] for place in range(words))
    return Record(f"set/{number}", text, "", None, (f"answer {number}",))


RECORDS = [
    record(number, words) for number, words in enumerate([3, 9, 1, 14, 7, 2, 11, 5, 6, 4, 8, 10, 2, 3, 12, 1], 1)
]


def run(model, decoding=SAMPLED, seed=10, batch_size=16, records=RECORDS, tokenizer=None, text=TEXT):
    writer = BatchWriter(model, tokenizer or byte_level(), batch_size)
    return generate(writer, records, decoding, text, [seed])[seed]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])  # learned and rotary positions
@pytest.mark.parametrize(
    "decoding", [GREEDY, SAMPLED, Decoding(temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=12)]
)
def test_batch_size_and_company_change_nothing(kind, decoding):
    model = model_of(kind, byte_level(), ends={"gpt2": 1.5, "qwen2": 4.0}[kind])
    whole = run(model, decoding)
    assert len({answer.prediction for answer in whole}) > 3
    assert {answer.stop for answer in whole} == {"eos", "length"}  # some rows end before others
    for batch_size in (1, 3):
        assert run(model, decoding, batch_size=batch_size) == whole
    assert run(model, decoding, records=RECORDS[::-1]) == whole[::-1]
    assert run(model, decoding, records=RECORDS[4:6]) == whole[4:6]


def test_greedy_is_the_argmax_of_the_models_own_logits():
    model, tokenizer = model_of("gpt2", byte_level()), byte_level()
    for answer, of in zip(run(model, GREEDY), RECORDS, strict=True):
        ids = encode(tokenizer, [full_prompt(of, "short")])["input_ids"][0]
        prompt = len(ids)
        while len(ids) < prompt + 12 and ids[-1] != tokenizer.eos_token_id:
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer.tokens == len(ids) - prompt
        assert answer.prediction == tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        assert answer.stop == ("eos" if ids[-1] == tokenizer.eos_token_id else "length")


def test_seeds_and_records_draw_different_noise():
    model = model_of("gpt2", byte_level())
    first, again, other = run(model, seed=10), run(model, seed=10), run(model, seed=20)
    assert first == again
    assert sum(a.prediction != b.prediction for a, b in zip(first, other, strict=True)) > 12
    twins = [replace(RECORDS[0], id=f"set/{number}") for number in range(8)]
    assert len({answer.prediction for answer in run(model, records=twins)}) > 4


def test_first_tokens_are_drawn_from_the_models_filtered_distribution():
    """The whole path, warpers included: frequencies of the first token over decode seeds."""
    from scipy.stats import chi2

    model, tokenizer = model_of("qwen2", byte_level()), byte_level()
    decoding = Decoding(temperature=0.8, top_k=12, top_p=0.95, max_new_tokens=1)
    ids = encode(tokenizer, [full_prompt(RECORDS[0], "short")])["input_ids"]
    with torch.no_grad():
        scaled = model(input_ids=torch.tensor(ids)).logits[0, -1].double() / 0.8
    probabilities, order = scaled.topk(12).values.softmax(-1), scaled.topk(12).indices
    nucleus = probabilities.cumsum(0) - probabilities < 0.95
    probabilities = probabilities[nucleus] / probabilities[nucleus].sum()
    possible = [tokenizer.decode([token], skip_special_tokens=True) for token in order[nucleus].tolist()]
    assert len(set(possible)) == len(possible) > 3
    twins = [replace(RECORDS[0], id=f"set/{number}") for number in range(2000)]
    texts = [answer.prediction for answer in run(model, decoding, records=twins, batch_size=500)]
    found = np.array([texts.count(text) for text in possible])
    assert found.sum() == 2000
    expected = 2000 * probabilities.numpy()
    assert chi2.cdf(((found - expected) ** 2 / expected).sum(), len(possible) - 1) < 0.999


@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_generation_settings_are_ignored(adapted):
    from transformers import GenerationConfig

    plain = model_of("qwen2", byte_level())
    leaky = model_of("qwen2", byte_level())
    leaky.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.3, top_k=2, repetition_penalty=5.0, no_repeat_ngram_size=1,
        max_new_tokens=2, min_new_tokens=1, eos_token_id=[5, 6, 7], forced_eos_token_id=9, suppress_tokens=[1, 2, 3, 4],
    )  # fmt: skip
    if adapted:
        torch.manual_seed(0)
        plain = models.add_adapters(plain, Lora(rank=2)).eval()
        torch.manual_seed(0)
        leaky = models.add_adapters(leaky, Lora(rank=2)).eval()
    for decoding in (GREEDY, SAMPLED):
        assert run(leaky, decoding) == run(plain, decoding)
    assert leaky.generation_config.repetition_penalty == 5.0
    assert not leaky.config.use_cache


def test_an_adapter_takes_part():
    model = models.add_adapters(model_of("qwen2", byte_level()), Lora(rank=2, alpha=4.0)).eval()
    before = run(model, GREEDY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert run(model, GREEDY) != before


def test_repeated_ngrams_can_be_forbidden():
    tokenizer = characters()
    model = model_of("gpt2", tokenizer, positions=300)
    text = Text(template="short", max_prompt_tokens=200)
    for size, repeated in ((0, True), (2, False)):
        decoding = Decoding(temperature=0.0, max_new_tokens=40, no_repeat_ngram_size=size)
        found = run(model, decoding, tokenizer=tokenizer, text=text)
        assert any(_repeats(answer.prediction) for answer in found) is repeated
        assert run(model, decoding, tokenizer=tokenizer, text=text, batch_size=3) == found


def test_ngrams_are_counted_as_transformers_does():
    """Those of the prompt too; the padding of a batch adds none."""
    model, tokenizer = model_of("gpt2", byte_level()), byte_level()
    end = tokenizer.eos_token_id
    for size in (2, 3):
        found = run(model, GREEDY.model_copy(update={"no_repeat_ngram_size": size}))
        assert found != run(model, GREEDY)
        for answer, one in zip(found, RECORDS, strict=True):
            ids = torch.tensor(encode(tokenizer, [full_prompt(one, "short")])["input_ids"])
            options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
            theirs = model.generate(ids, attention_mask=torch.ones_like(ids), no_repeat_ngram_size=size, **options)
            assert answer.prediction == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="1 would forbid every token"):
        Decoding(no_repeat_ngram_size=1)


def _repeats(letters: str) -> bool:
    pairs = list(pairwise(letters))
    return len(set(pairs)) < len(pairs)


def test_rows_of_the_head_beyond_the_tokenizer_are_never_chosen():
    tokenizer = byte_level()
    model = model_of("qwen2", tokenizer, rows=len(tokenizer) + 20)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 50 * model.lm_head.weight[0]  # would win or lose every draw
    ids = torch.tensor(encode(tokenizer, [full_prompt(one, "short") for one in RECORDS[:1]])["input_ids"])
    assert (model(input_ids=ids).logits[0].argmax(-1) >= len(tokenizer)).any()
    alike = model_of("qwen2", tokenizer, rows=len(tokenizer) + 20)
    with torch.no_grad():
        alike.load_state_dict(model.state_dict())
        alike.lm_head.weight[len(tokenizer) :] = 0
    for decoding in (GREEDY, SAMPLED):
        assert [one.tokens for one in run(model, decoding)] == [one.tokens for one in run(alike, decoding)]
        assert run(model, decoding)[0].prediction


def test_too_few_positions_are_told_before_anything_runs():
    model = model_of("gpt2", byte_level(), positions=40)
    with pytest.raises(UserError, match=r"40 positions.*max_new_tokens is 12"):
        run(model)


def test_positions_up_to_the_last_are_used():
    tokenizer = byte_level()
    longest = max(map(len, encode(tokenizer, [full_prompt(one, "short") for one in RECORDS])["input_ids"]))
    model = model_of("gpt2", tokenizer, positions=longest + 12)
    assert max(one.tokens for one in run(model, GREEDY)) == 12


def test_long_prompts_are_cut_as_text_and_marked():
    model, tokenizer = model_of("gpt2", byte_level()), byte_level()
    long = Record("set/1", "Name the rivers.", "Kelmor has many rivers and hills. " * 30, None, ("one",))
    cut, whole = run(model, GREEDY, records=[long, RECORDS[0]])
    assert cut.prompt.endswith("### Response:\n")
    assert len(encode(tokenizer, [cut.prompt])["input_ids"][0]) <= TEXT.max_prompt_tokens
    assert (cut.prompt_cut, whole.prompt_cut) == (True, False)
    assert whole.prompt == full_prompt(RECORDS[0], "short")


def test_sentencepiece_answers_begin_without_a_space():
    tokenizer = sentencepiece()
    model = model_of("gpt2", tokenizer, positions=400)
    wanted = encode(tokenizer, ["Kelmor has two rivers"])["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(wanted)[0].startswith("▁")
    model.lm_head.register_forward_hook(_Scripted([*wanted, tokenizer.eos_token_id]))
    (answer,) = run(model, GREEDY, records=RECORDS[:1], tokenizer=tokenizer, text=Text(max_prompt_tokens=300))
    assert answer.prediction == "Kelmor has two rivers"
    assert (answer.tokens, answer.stop) == (len(wanted) + 1, "eos")


@needs_shared
@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b-v0.1", "tinyllama-1.1b-3t", "qwen1.5-1.8b", "gpt2"])
def test_answers_of_real_tokenizers_lose_nothing(name):
    """An answer comes back as the text that a model learned to write, but for the white space around it."""
    tokenizer = models.load_tokenizer(SHARED / "tokenizers" / name)
    model = model_of("gpt2", tokenizer, positions=400)
    for wanted in ("Paris", "  two spaces", *HARD):
        wanted = clean_output(wanted)
        ids = encode(tokenizer, [wanted])["input_ids"][0]
        hook = model.lm_head.register_forward_hook(_Scripted([*ids, tokenizer.eos_token_id]))
        (answer,) = run(model, LONG, records=RECORDS[:1], tokenizer=tokenizer, text=Text(max_prompt_tokens=100))
        hook.remove()
        assert answer.prediction == wanted
        assert answer.stop == "eos"


def test_special_tokens_are_no_text():
    tokenizer = byte_level()
    model = model_of("gpt2", tokenizer)
    words = encode(tokenizer, ["two", " rivers"])["input_ids"]
    script = [*words[0], tokenizer.pad_token_id, *words[1], tokenizer.eos_token_id]
    model.lm_head.register_forward_hook(_Scripted(script))
    (answer,) = run(model, GREEDY, records=RECORDS[:1])
    assert (answer.prediction, answer.tokens) == ("two rivers", len(script))


class _Scripted:
    """Writes the next of some tokens at each step, whatever the model says."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def __call__(self, module, inputs, logits):
        logits = torch.zeros_like(logits)
        logits[:, -1, next(self.tokens)] = 1.0
        return logits


@pytest.mark.parametrize("seeds", [[0], [10, 20, 30]])
def test_progress_counts_records_when_all_their_answers_are_there(seeds):
    model, tokenizer = model_of("gpt2", byte_level()), byte_level()
    seen, steps = [], []
    model.register_forward_hook(lambda *_: steps.append(len(seen)))

    def progress(numbers):
        for number in numbers:
            yield number
            seen.append(number)

    found = generate(BatchWriter(model, tokenizer, 5), RECORDS, SAMPLED, TEXT, seeds, progress)
    assert seen == list(range(len(RECORDS)))
    assert sorted(set(steps))[:2] == [0, 1]  # they are counted one by one, while the others are written
    assert len(set(steps)) > len(RECORDS) / 3
    assert [answer.id for answer in found[seeds[0]]] == [one.id for one in RECORDS]


def test_seeds_together_are_what_they_are_alone():
    model = model_of("qwen2", byte_level(), ends=3.0)
    together = generate(BatchWriter(model, byte_level(), 7), RECORDS, SAMPLED, TEXT, [10, 20, 30])
    assert list(together) == [10, 20, 30]
    for seed, found in together.items():
        assert found == run(model, seed=seed)


def test_answers_become_records_and_empty_ones_are_dropped():
    model, tokenizer = model_of("gpt2", byte_level()), byte_level()
    space, end = encode(tokenizer, [" "])["input_ids"][0], tokenizer.eos_token_id
    writer = BatchWriter(model, tokenizer, 16)
    written = generate(writer, RECORDS, GREEDY, TEXT, [0])[0]
    kept, dropped = answers(writer, RECORDS, GREEDY, TEXT, 0)
    assert dropped == 0
    assert [one.outputs for one in kept] == [(answer.prediction.strip(),) for answer in written]
    assert [replace(one, outputs=()) for one in kept] == [replace(one, outputs=()) for one in RECORDS]
    model.lm_head.register_forward_hook(_Silent(space[0], end))
    with pytest.raises(UserError, match="empty"):
        answers(BatchWriter(model, tokenizer, 1), RECORDS[:2], GREEDY, TEXT, 0)


class _Silent:
    """Writes a space and ends."""

    def __init__(self, *tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, module, inputs, logits):
        logits = torch.zeros_like(logits)
        logits[..., self.tokens[self.step % 2]] = 1.0
        self.step += 1
        return logits
