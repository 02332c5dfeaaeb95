"""The calls of vLLM's interface. vLLM is no part of the environment: a module with its signatures stands in for it, and writes greedily."""

import sys
import types
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from kdbench import files, models
from kdbench.errors import UserError
from kdbench.evaluation import generation
from kdbench.settings import Decoding, Hardware, Lora, Text
from tests.data.tokenizers import byte_level
from tests.evaluation.test_generation import RECORDS, TEXT, model_of

GREEDY = Decoding(temperature=0.0, max_new_tokens=12, backend="vllm")
HARDWARE = Hardware(gpus=0, generation_batch_size=3)


@dataclass
class SamplingParams:
    """Those of vllm/sampling_params.py that an adapter may set."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict | None = None
    allowed_token_ids: list[int] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class LLM:
    """As vllm/entrypoints/llm.py; the model is transformers'."""

    made: ClassVar[list["LLM"]] = []

    def __init__(self, model: str, *, tokenizer=None, skip_tokenizer_init=False, trust_remote_code=False, dtype="auto",
                 seed=0, max_model_len=None, max_num_seqs=None, enable_prefix_caching=None, generation_config="auto",
                 enable_lora=False, max_lora_rank=16):  # fmt: skip
        self.given = {key: value for key, value in locals().items() if key != "self"}
        self.asked: list[tuple] = []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        model = models.load(lora_request.lora_path if lora_request else self.given["model"])
        self.asked += [(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, sampling_params, strict=True)]
        return [self._output(model, prompt["prompt_token_ids"], one)
                for prompt, one in zip(prompts, sampling_params, strict=True)]  # fmt: skip

    def _output(self, model, ids, parameters):
        assert parameters.ignore_eos
        tokens = []
        while len(tokens) < parameters.max_tokens and not set(tokens) & set(parameters.stop_token_ids):
            logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, -1]
            allowed = parameters.allowed_token_ids or range(len(logits))
            tokens.append(max(allowed, key=lambda token: logits[token].item()))
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(tokens))])


@pytest.fixture
def vllm(monkeypatch):
    module, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for part in (module, lora, request):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.setattr(LLM, "made", [])
    return LLM.made


def saved(folder, model, source=None):
    tokenizer = byte_level()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source is not None:
        described = files.read_json(folder / "adapter_config.json")
        files.write_json(folder / "adapter_config.json", described | {"base_model_name_or_path": str(source)})
    files.write_manifest(folder, "model")
    return folder


def written(folder, decoding, seeds=(1,)):
    writer = generation.load(folder, HARDWARE, decoding, TEXT)
    return generation.generate(writer, RECORDS[:4], decoding, TEXT, seeds)


def test_greedy_answers_are_those_of_transformers(vllm, tmp_path):
    folder = saved(tmp_path / "model", model_of("gpt2", byte_level(), rows=len(byte_level()) + 20, ends=1.5))
    assert written(folder, GREEDY) == written(folder, GREEDY.model_copy(update={"backend": "transformers"}))
    (made,) = vllm
    assert made.given | {"model": ""} == LLM("", skip_tokenizer_init=True, dtype="float32", max_num_seqs=3,
        max_model_len=TEXT.max_prompt_tokens + 12, enable_prefix_caching=True, generation_config="vllm").given  # fmt: skip
    assert all(one.allowed_token_ids == list(range(len(byte_level()))) for _, one in made.asked)


def test_an_adapter_is_handed_over(vllm, tmp_path):
    base = saved(tmp_path / "base", model_of("qwen2", byte_level()))
    model = models.add_adapters(models.load(base, train=True), Lora(rank=12))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = saved(tmp_path / "adapter", model, base)
    assert written(folder, GREEDY) == written(folder, GREEDY.model_copy(update={"backend": "transformers"}))
    assert (vllm[0].given["model"], vllm[0].given["enable_lora"], vllm[0].given["max_lora_rank"]) == (
        str(base),
        True,
        16,
    )


def test_a_sampled_answer_has_a_seed_of_its_own(vllm, tmp_path):
    folder = saved(tmp_path / "model", model_of("qwen2", byte_level()))
    decoding = Decoding(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=4, precision="bf16", backend="vllm")
    found = written(folder, decoding, seeds=[1, 2])
    assert [one.id for one in found[2]] == [one.id for one in RECORDS[:4]]
    assert vllm[0].given["dtype"] == "bfloat16"
    assert len({one.seed for _, one in vllm[0].asked}) == 8
    assert {(one.temperature, one.top_p, one.top_k, one.max_tokens) for _, one in vllm[0].asked} == {(0.7, 0.9, 5, 4)}
    prompts = [ids for ids, _ in vllm[0].asked]
    assert prompts[::2] == prompts[1::2]  # those of a prompt stand together
    assert list(map(len, prompts)) == sorted(map(len, prompts), reverse=True)


def test_what_cannot_be_done_is_told(vllm, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`backend` vllm knows no `no_repeat_ngram_size`"):
        Decoding(backend="vllm", no_repeat_ngram_size=3)
    folder = saved(tmp_path / "model", model_of("qwen2", byte_level(), positions=40))
    with pytest.raises(UserError, match="40 positions"):
        written(folder, GREEDY)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"^evaluation\.backend is vllm, but vLLM is not installed"):
        generation.load(folder, HARDWARE, GREEDY, Text())
