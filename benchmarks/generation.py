"""How fast answers are written, beside a plain `generate` call for each decode seed: `python -m benchmarks.generation` prints it as JSON.

The model has random weights, and would hardly ever end an answer. A bias of the head makes it: the end of text is as likely at each
position as answers of the mean length of the references need it, so lengths are distributed geometrically, nearly as those of Dolly are.
"""

import json
import math
import time

import numpy as np
import torch

from benchmarks import rows
from benchmarks.shapes import FULL, Shapes
from kdbench import cli, models
from kdbench.data import records
from kdbench.data.text import encode, fit_prompts
from kdbench.evaluation.decoding import BatchWriter
from kdbench.settings import Decoding, InitModel, Text

SEEDS = (10, 20, 30, 40, 50)


def measure(shapes: Shapes = FULL, batch_size: int = 16, prompts: int = 16, max_new_tokens: int = 256) -> dict:
    """Let a GPT2 of random weights answer prompts with five decode seeds, by the library and in the plain way, in turns.

    The plain way is transformers' `generate` for each seed and batch: prompts in their own order, padded to the longest of all, and every
    row computed until the last one of its batch ends. One thread; CPU seconds, because other programs lengthen all others.

    Args:
        shapes: sizes of the model.
        batch_size: answers that are written at a time.
        prompts: how many; their first in Dolly's dev set, or generated ones.
        max_new_tokens: of an answer.

    Returns:
        `ratio_to_plain`: tokens per second, ours by the plain way's. Of both, `ours` and `plain`: `cpu_seconds`, `seconds`, `tokens`,
        `tokens_per_second` (by CPU seconds) and `lengths`, the deciles of the answers' tokens; `reference_lengths` and `prompt_tokens`,
        those of the references and prompts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(shapes, batch_size, prompts, max_new_tokens)
    finally:
        torch.set_num_threads(before)


def _measure(shapes: Shapes, batch_size: int, prompts: int, max_new_tokens: int) -> dict:
    if rows.is_real(shapes):
        chosen = records.read_jsonl(rows.shared() / "data" / "dolly" / "dev.jsonl", rows=prompts)
    else:
        chosen = rows.generated(prompts)
    tokenizer = rows.tokenizer(shapes, 0, rows.sources(shapes))
    references = encode(tokenizer, [record.outputs[0] for record in chosen])["input_ids"]
    wanted = [min(len(ids) + 1, max_new_tokens) for ids in references]
    model = _model(shapes, tokenizer, np.mean(wanted).item())
    ids = encode(tokenizer, fit_prompts(chosen, [tokenizer], Text()))["input_ids"]
    decoding = Decoding(temperature=1.0, max_new_tokens=max_new_tokens)
    writer = BatchWriter(model, tokenizer, batch_size)
    names = [record.id for record in chosen]

    short = decoding.model_copy(update={"max_new_tokens": 4})  # first calls are slow
    writer.write(ids[:batch_size], names[:batch_size], short, SEEDS[:1], lambda: None)
    _plain(model, tokenizer, ids[:batch_size], short, batch_size, SEEDS[0])
    ours, theirs = _Timed(), _Timed()
    answers = ours.call(lambda: writer.write(ids, names, decoding, SEEDS, lambda: None))
    plain = [theirs.call(lambda seed=seed: _plain(model, tokenizer, ids, decoding, batch_size, seed)) for seed in SEEDS]
    found = {
        "ours": ours.told([tokens for of_prompt in answers for tokens in of_prompt]),
        "plain": theirs.told([tokens for of_seed in plain for tokens in of_seed]),
    }
    return {
        "ratio_to_plain": found["ours"]["tokens_per_second"] / found["plain"]["tokens_per_second"],
        "batch_size": batch_size,
        "prompts": len(chosen),
        "decode_seeds": len(SEEDS),
        "prompt_tokens": _deciles(map(len, ids)),
        "reference_lengths": _deciles(wanted),
        **found,
    }


def _model(shapes: Shapes, tokenizer, mean_length: float):
    architecture = shapes.student | {"vocab_size": shapes.vocabularies[0]}
    model = models.create(InitModel(source="init", architecture=architecture, tokenizer="-", seed=rows.SEED), tokenizer)
    bias = torch.zeros(shapes.vocabularies[0])
    share = 1 / mean_length
    bias[tokenizer.eos_token_id] = math.log(share / (1 - share)) + math.log(len(tokenizer))
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.requires_grad_(False).eval()


def _plain(
    model, tokenizer, prompts: list[list[int]], decoding: Decoding, batch_size: int, seed: int
) -> list[list[int]]:
    from transformers import GenerationConfig

    end, width = tokenizer.eos_token_id, max(map(len, prompts))
    settings = GenerationConfig(
        do_sample=True, temperature=decoding.temperature, top_k=0, max_new_tokens=decoding.max_new_tokens,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    torch.manual_seed(seed)
    written = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        written += [row[: row.index(end) + 1] if end in row else row for row in output]
    return written


class _Timed:
    """Adds up the time of some calls."""

    def __init__(self):
        self.cpu_seconds = self.seconds = 0.0

    def call(self, function):
        cpu, wall = time.process_time(), time.perf_counter()
        result = function()
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.perf_counter() - wall
        return result

    def told(self, answers: list[list[int]]) -> dict:
        tokens = sum(map(len, answers))
        return {
            "cpu_seconds": self.cpu_seconds,
            "seconds": self.seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / self.cpu_seconds,
            "lengths": _deciles(map(len, answers)),
        }


def _deciles(numbers) -> list[float]:
    return np.percentile(list(numbers), np.arange(0, 101, 10)).tolist()


def main():
    print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    cli.run(main)
