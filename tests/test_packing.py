"""Batches without padding: the states and gradients of padded ones, sequences that do not see each other, models that cannot."""

import pytest
import torch

from kdbench import models, packing
from kdbench.data import batches
from kdbench.data.records import read_jsonl
from kdbench.data.tokens import tokenize
from kdbench.settings import Lora, Text
from tests import tiny
from tests.shared import SHARED, needs_shared

FAMILIES = {
    "gpt2": tiny.gpt2,
    "qwen2": tiny.qwen2,  # two heads read one key
    "llama": tiny.llama,
    "mistral": tiny.mistral,  # a window of 8 tokens
    "opt": tiny.opt,
}
LENGTHS = ((3, 5), (7, 12), (2, 9), (5, 1), (4, 4))
ROWS = [1, 3, 0, 4]
every = pytest.mark.parametrize("family", FAMILIES)


def build(family, tuning="full"):
    """A model, the same each time, as it is and able to read packed batches."""
    found = []
    for _ in range(2):
        model = FAMILIES[family]().double()
        if tuning == "lora":
            torch.manual_seed(3)
            model = models.add_adapters(model, Lora(rank=2, dropout=0.0))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # they start from 0, and the other half would get no gradient
                    torch.nn.init.normal_(parameter)
        found.append(model)
    assert models.pack(found[1])
    return found


def side_of(rows=ROWS, lengths=LENGTHS):
    return tiny.side(tiny.tokens(40, lengths), rows)


def states_and_gradients(model, side, **autocast):
    with torch.autocast("cpu", torch.bfloat16, **autocast or {"enabled": False}):
        hidden = models.response_rows(model, side).hidden
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad((hidden * weights).sum(), list(trained.values()), allow_unused=True)
    return {"states": hidden} | dict(zip(trained, found, strict=True))


def assert_close(ours, theirs, tolerance=1e-9):
    assert ours.keys() == theirs.keys()
    assert sum(value is not None for value in theirs.values()) >= 5
    for name, value in theirs.items():
        assert (ours[name] is None) == (value is None), name  # an untied head has no part in the states
        if value is not None:
            assert (ours[name] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), name


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("tuning", ["full", "lora"])
@every
def test_states_and_gradients_are_those_of_padded_batches(family, tuning):
    padded, packed = build(family, tuning)
    side = side_of()
    widths = []
    models.transformer(packed).register_forward_hook(
        lambda module, arguments, output: widths.append(output.last_hidden_state.shape[:2])
    )
    assert_close(states_and_gradients(packed, side), states_and_gradients(padded, side))
    assert widths == [(1, sum(side.lengths))]


@every
def test_no_sequence_sees_another(family):
    _, model = build(family)
    with torch.no_grad():
        alone = packing.states(models.transformer(model), side_of([0]))
        found = packing.states(models.transformer(model), side_of([1, 0, 4])).split((19, 8, 8))[1]
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


@every
def test_a_token_sees_those_before_it_and_no_later_one(family):
    _, model = build(family)
    side = side_of([1, 0])
    table = torch.randn(40, model.get_input_embeddings().weight.shape[1], dtype=torch.float64)
    model.get_input_embeddings().weight.data.copy_(table)
    found = []
    for token in (3, 4):
        side.input_ids[10] = token
        with torch.no_grad():
            found.append(packing.states(models.transformer(model), side))
    changed = (found[0] != found[1]).any(-1)
    layers, window = (2, 8) if family == "mistral" else (1, 19)
    last = min(10 + layers * (window - 1), 18)
    assert changed.nonzero().flatten().tolist() == list(range(10, last + 1))


@every
def test_recomputed_activations(family):
    padded, packed = (model.train() for model in build(family))
    expected = states_and_gradients(padded, side_of())
    packed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    passes = []
    layer = next(module for name, module in packed.named_modules() if name.endswith(("c_proj", "o_proj", "out_proj")))
    layer.register_forward_hook(lambda *_: passes.append(1))
    assert_close(states_and_gradients(packed, side_of()), expected)
    assert len(passes) == 2


@every
def test_bf16(family):
    padded, packed = (model.float() for model in build(family))
    expected = states_and_gradients(padded, side_of())
    found = states_and_gradients(packed, side_of(), enabled=True)
    narrow = states_and_gradients(padded, side_of(), enabled=True)
    for name, value in expected.items():
        if value is not None and value.abs().max() > 1e-3:  # the bias of keys has no gradient
            error, usual = ((of[name].float() - value).norm() / value.norm() for of in (found, narrow))
            assert error <= 2 * usual + 1e-2, name


@every
def test_weights_in_bf16(family):
    model = FAMILIES[family]().bfloat16()
    with torch.no_grad():
        expected = models.response_rows(model, side_of()).hidden
        assert models.pack(model)
        found = models.response_rows(model, side_of()).hidden
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.03 * expected.norm()


@every
def test_generation_is_as_before(family):
    plain, packed = build(family)
    prompts = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[0, :4] = mask[1, :1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(prompts, **options), plain.generate(prompts, **options))


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_together_are_sequences_apart(window):
    """The way of GPUs and the way of CPUs, with two heads to a key."""
    torch.manual_seed(0)
    sequences = packing.Sequences.of(side_of())
    states = [
        torch.randn(1, heads, sum(sequences.lengths), 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]

    def causal(query, key, value):
        band = packing._band(query, window)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, band, is_causal=band is None, enable_gqa=True
        ).transpose(1, 2)

    found = [way(causal, sequences, *states) for way in (packing.apart, packing.together)]
    torch.testing.assert_close(*found)
    weights = torch.randn_like(found[0])
    for ours, theirs in zip(*(torch.autograd.grad((of * weights).sum(), states) for of in found), strict=True):
        torch.testing.assert_close(ours, theirs)


def _bloom():
    """Its positions are biases of the attention, made from the mask."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0))


def _mamba():
    """It has no attention: a state runs through all tokens."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))


def _counts_positions_itself():
    from transformers import GPT2Model

    class Counting(GPT2Model):
        def forward(self, *args, position_ids=None, **options):
            return super().forward(*args, **options)

    model = tiny.gpt2()
    model.transformer.__class__ = Counting
    return model


@pytest.mark.parametrize("make", [_bloom, _mamba, _counts_positions_itself])
def test_models_that_cannot_read_packed_batches_get_padded_ones(make):
    torch.manual_seed(0)
    model = make().eval()
    before = model.config._attn_implementation
    assert not models.pack(model)
    assert model.config._attn_implementation == before
    side = side_of()
    with torch.no_grad():
        found = packing.states(models.transformer(model), side)
        alone = [
            models.transformer(model)(input_ids=ids[None]).last_hidden_state[0]
            for ids in side.input_ids.split(side.lengths)
        ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_asking_leaves_the_mode_and_the_saved_configuration_as_they_were():
    for training in (True, False):
        model = tiny.qwen2().train(training)
        expected = model.config.to_dict()
        assert models.pack(model)
        assert models.pack(model)
        assert model.training == model.model.layers[0].training == training
        assert model.config.to_dict() == expected


@needs_shared
def test_layers_compute_the_tokens_of_the_text_and_no_more():
    """Real texts in batches of 4 as they are drawn. Padded to the longest they would be half as many again."""
    reader = models.load_tokenizer(SHARED / "tokenizers" / "gpt2")
    records = read_jsonl(SHARED / "data" / "dolly" / "valid.jsonl")[:64]
    tokens = tokenize(records, reader, None, Text())
    model = tiny.gpt2(vocabulary=len(reader), positions=512)
    assert models.pack(model)
    computed = []
    for layer in model.transformer.h:
        layer.mlp.register_forward_hook(lambda module, arguments, output: computed.append(output[..., 0].numel()))
    padded = 0
    for rows in batches.schedule(len(records), 4, epoch=0, seed=1):
        padded += len(rows) * int(tokens.student.lengths[rows].max())
        with torch.no_grad():
            models.response_rows(model, batches.side(tokens.student, rows))
    text = int(tokens.student.lengths.sum())
    assert sum(computed) == text * len(model.transformer.h)
    assert padded > 1.4 * text
