"""Writing with vLLM, where it is installed. Not tested on a GPU: the tests check the calls against its signatures, not what it writes.

What it cannot keep of `generation.generate`: a sampled answer is drawn by vLLM's own generator, seeded by (decode seed, record), so it is
another one than transformers' at the same seed, from the same distribution; and on GPUs the company of other requests changes rounding.
"""

from collections.abc import Callable, Sequence

from kdbench import files, models
from kdbench.errors import UserError
from kdbench.settings import Decoding

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that its kernels know


class VllmWriter:
    """Lets a model write by vLLM: paged keys and values, continuous batching, prompts cached for all decode seeds.

    Args:
        folder: the model or its manifest, or a LoRA adapter; checked.
        decoding: precision, and tokens of an answer at most.
        prompt_tokens: of a prompt at most.
        batch_size: answers at a time.

    Raises:
        UserError: vLLM is not installed; the model is missing or damaged, or its adapter too large for vLLM.
    """

    def __init__(self, folder, decoding: Decoding, prompt_tokens: int, batch_size: int):
        described = files.read_manifest(folder, "model")
        try:
            import vllm
        except ImportError:
            raise UserError(
                "evaluation.backend is vllm, but vLLM is not installed: install it, or take `transformers`"
            ) from None
        from transformers import AutoConfig

        trusted = described.get("trust_remote_code", False)
        folder = files.folder_of(folder)
        base, lora = folder, {}
        self._adapter = None
        if (folder / "adapter_config.json").exists():
            adapter = files.read_json(folder / "adapter_config.json")
            rank = next((rank for rank in _LORA_RANKS if rank >= adapter["r"]), None)
            if rank is None:
                raise UserError(
                    f"{folder}: an adapter of rank {adapter['r']}; vLLM knows ranks up to {_LORA_RANKS[-1]}"
                )
            from vllm.lora.request import LoRARequest

            base, lora = adapter["base_model_name_or_path"], {"enable_lora": True, "max_lora_rank": rank}
            self._adapter = LoRARequest("adapter", 1, str(folder.resolve()))
        self.tokenizer = models.load_tokenizer(folder, trusted)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trusted)
        self.positions = getattr(config, "max_position_embeddings", None)
        self._rows = config.vocab_size
        needed = prompt_tokens + decoding.max_new_tokens
        self._sampling = vllm.SamplingParams
        self._model = vllm.LLM(
            model=str(base),
            skip_tokenizer_init=True,  # it gets tokens and gives tokens: texts are made in one place
            trust_remote_code=trusted,
            dtype=_DTYPES[decoding.precision],
            max_model_len=needed if self.positions is None else min(needed, self.positions),
            max_num_seqs=batch_size,
            enable_prefix_caching=True,
            generation_config="vllm",  # nothing of the model's own generation_config.json
            **lora,
        )

    def write(
        self,
        prompts: Sequence[list[int]],
        names: Sequence[str],
        decoding: Decoding,
        seeds: Sequence[int],
        done: Callable[[], None],
    ) -> list[list[list[int]]]:
        """Answer prompts; see `decoding.BatchWriter.write`. vLLM shows its own progress, so `done` is called at the end."""
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        asked = [(row, seed) for row in order for seed in seeds]
        outputs = self._model.generate(
            [{"prompt_token_ids": list(prompts[row])} for row, _ in asked],
            [self._parameters(decoding, names[row], seed) for row, seed in asked],
            lora_request=self._adapter,
        )
        written: list[list[list[int]]] = [[] for _ in prompts]
        for (row, _), output in zip(asked, outputs, strict=True):
            written[row].append(list(output.outputs[0].token_ids))
        for _ in prompts:
            done()
        return written

    def _parameters(self, decoding: Decoding, name: str, seed: int):
        words = len(self.tokenizer)
        return self._sampling(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            seed=int(files.fingerprint([seed, name]), 16) >> 1,  # a generator takes 63 bits
            max_tokens=decoding.max_new_tokens,
            ignore_eos=True,  # whatever the model's files call the end; the tokenizer's is the one that models learn
            stop_token_ids=[self.tokenizer.eos_token_id],
            allowed_token_ids=list(range(words)) if self._rows > words else None,
            detokenize=False,
        )
