"""Answers of a model, by transformers' own generation, the same for every batch size."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdbench import files
from kdbench.data.records import Record, clean_output
from kdbench.data.text import encode, fit_prompts, full_prompt
from kdbench.errors import UserError
from kdbench.evaluation.predictions import Prediction
from kdbench.settings import Decoding, Text


def generate(
    model,
    tokenizer,
    records: Sequence[Record],
    decoding: Decoding,
    text: Text,
    seed: int,
    batch_size: int,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[Prediction]:
    """Answer the prompts of some records, in their order.

    An answer depends on the model, its prompt and the seed alone: sampling draws its noise from (seed, record, position), so neither the
    batch size nor the other records matter (on a CPU in float32; elsewhere batches change the rounding of logits, and GPUs draw another
    noise). Rows of the head beyond the tokenizer's tokens are no words, and are never chosen.

    Args:
        model: causal language model in evaluation mode, on its device.
        tokenizer: its tokenizer.
        records: what to answer.
        decoding: how.
        text: template and length of prompts; too long a prompt is cut as text and keeps its response marker.
        seed: decode seed; greedy decoding does not read it.
        batch_size: prompts that are answered together.
        progress: wraps the iteration over batches.

    Raises:
        UserError: the model has too few positions for a prompt and an answer.
    """
    prompts = fit_prompts(records, [tokenizer], text)
    ids = encode(tokenizer, prompts)["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, ids))
    if limit is not None and longest + decoding.max_new_tokens > limit:
        raise UserError(
            f"the model has {limit} positions, the longest prompt {longest} tokens, and evaluation.max_new_tokens is"
            f" {decoding.max_new_tokens}: lower the latter or text.max_prompt_tokens"
        )
    # longest first: what does not fit into memory fails at once
    order = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[int, Prediction] = {}
    for rows in progress(batches):
        written = _answer(
            model, tokenizer, [ids[row] for row in rows], [records[row].id for row in rows], decoding, seed
        )
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = _prediction(records[row], prompts[row], tokens, tokenizer, text)
    return [answers[row] for row in range(len(records))]


def _prediction(record: Record, prompt: str, tokens: list[int], tokenizer, text: Text) -> Prediction:
    return Prediction(
        id=record.id,
        prompt=prompt,
        prompt_cut=prompt != full_prompt(record, text.template),
        prediction=tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        references=list(record.outputs),
        tokens=len(tokens),
        stop="eos" if tokens[-1] == tokenizer.eos_token_id else "length",
    )


def answers(model, tokenizer, records: Sequence[Record], *arguments) -> tuple[list[Record], int]:
    """The records with a model's answers in the place of their references; those it left empty are dropped, and counted.

    Args:
        model, tokenizer, records, arguments: see `generate`.

    Raises:
        UserError: all answers are empty.
    """
    written = generate(model, tokenizer, records, *arguments)
    texts = [clean_output(answer.prediction) for answer in written]
    kept = [replace(record, outputs=(text,)) for record, text in zip(records, texts, strict=True) if text]
    if not kept:
        raise UserError("the teacher answers none of the training prompts: its answers are empty")
    return kept, len(records) - len(kept)


def _answer(
    model, tokenizer, prompts: list[list[int]], names: list[str], decoding: Decoding, seed: int
) -> list[list[int]]:
    """New tokens of each prompt, up to and with the end of text."""
    from transformers import GenerationConfig

    end, size = tokenizer.eos_token_id, len(tokenizer)
    width = max(map(len, prompts))
    padded = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(  # nothing of the model's own generation_config.json
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=list(range(size, model.get_output_embeddings().weight.shape[0])) or None,
        use_cache=True,
    )
    own, model.generation_config = model.generation_config, settings
    try:
        with torch.no_grad():
            output = model.generate(
                padded,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=_sampling(decoding, names, seed, model.device),
            )
    finally:
        model.generation_config = own
    return [_until(row, end) for row in output[:, width:].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _sampling(decoding: Decoding, names: list[str], seed: int, device):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chain = LogitsProcessorList()
    if decoding.temperature == 0:
        return chain
    chain.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        chain.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        chain.append(TopPLogitsWarper(decoding.top_p))
    chain.append(GumbelNoise(names, seed, device))
    return chain


class GumbelNoise:
    """Makes greedy decoding sample: the argmax of logits plus Gumbel noise is a draw from their softmax (Maddison et al. 2014).

    Each record's noise comes from a generator of its own, seeded by the decode seed and the record's name.

    Args:
        names: of the records, in the batch's order.
        seed: decode seed.
        device: of the logits; the noise is drawn there.
    """

    def __init__(self, names: Sequence[str], seed: int, device="cpu"):
        seeds = [int(files.fingerprint([seed, name]), 16) >> 1 for name in names]  # a generator takes 63 bits
        self._generators = [torch.Generator(device).manual_seed(of) for of in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) with noise, float32."""
        # float64: near 1 a float32 is so coarse that unlikely tokens could never win
        uniform = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(uniform, self._generators, strict=True):
            row.uniform_(generator=generator)
        return scores.float() - uniform.log_().neg_().log_().float()
