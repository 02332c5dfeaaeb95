"""Writing with transformers' models: prompts are read once for all decode seeds, and a place that an answer leaves is taken by the next."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdbench import files
from kdbench.errors import UserError
from kdbench.settings import Decoding

_BLOCK = 256  # tokens whose probabilities are first added up together when one of them is drawn
_KEPT_BY_KEYS_AND_VALUES = {"full_attention", "sliding_attention"}


class BatchWriter:
    """Lets a model write, several answers at a time.

    Answers are written in the order of their prompts' lengths, longest first: what does not fit into memory fails at once, and neighbours
    waste little. Of each prompt there are as many answers as decode seeds, which share its prefill.

    Args:
        model: causal language model in evaluation mode, on its device; full weights or an adapter.
        tokenizer: its tokenizer.
        batch_size: answers at a time; it changes nothing but rounding.

    Raises:
        UserError: the model remembers by other means than keys and values (state space and linear attention).
    """

    def __init__(self, model, tokenizer, batch_size: int):
        self.tokenizer = tokenizer
        self.positions = getattr(model.config, "max_position_embeddings", None)
        self._model, self._batch_size = model, batch_size
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._accepted = inspect.signature(inner.forward).parameters.keys()
        others = set(getattr(model.config, "layer_types", None) or ()) - _KEPT_BY_KEYS_AND_VALUES
        if others:
            raise UserError(
                f"{model.config.model_type}: generation does not support its layers of the kind {', '.join(sorted(others))}"
            )

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[list[int]],
        names: Sequence[str],
        decoding: Decoding,
        seeds: Sequence[int],
        done: Callable[[], None],
    ) -> list[list[list[int]]]:
        """Answer prompts.

        Args:
            prompts: their tokens, at least one each.
            names: of their records.
            decoding: how.
            seeds: decode seeds.
            done: called when all answers to a prompt are written.

        Returns:
            For each prompt and seed the new tokens, up to and with the end of text.
        """
        from kdbench.evaluation.slots import Slots

        choose = _Choice(decoding)
        written: list[list[list[int]]] = [[[] for _ in seeds] for _ in prompts]
        left = [len(seeds)] * len(prompts)
        waiting = self._read(prompts, names, decoding, seeds)
        slots = Slots(self._batch_size, max(map(len, prompts)) + decoding.max_new_tokens)
        active: list[_Answer] = []

        def ended(answer: _Answer) -> bool:
            if answer.tokens[-1] != self.tokenizer.eos_token_id and len(answer.tokens) < decoding.max_new_tokens:
                return False
            written[answer.prompt][answer.seed] = answer.tokens
            left[answer.prompt] -= 1
            if not left[answer.prompt]:
                done()
            return True

        while True:
            # the first token comes from the prompt's own logits, so an answer may end before it needs a place
            while fresh := list(islice(waiting, self._batch_size - len(active))):
                choose([answer for answer, _ in fresh], torch.stack([prompt.logits for _, prompt in fresh]))
                for answer, prompt in fresh:
                    if not ended(answer):
                        slots.add(prompt.states, prompt.row, prompt.length)
                        active.append(answer)
            if not active:
                return written
            choose(active, self._step(slots, [answer.tokens[-1] for answer in active]))
            for place in reversed(range(len(active))):
                if ended(active[place]):
                    slots.remove(place)
                    active[place] = active[-1]
                    active.pop()

    def _read(self, prompts, names, decoding: Decoding, seeds) -> Iterator[tuple["_Answer", "_Prompt"]]:
        """Answers to be written, longest prompts first, each with its prompt; prompts of like length are read together."""
        from transformers.cache_utils import DynamicCache

        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        together = max(1, self._batch_size // len(seeds))
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            width, end = len(prompts[rows[0]]), self.tokenizer.eos_token_id
            ids = torch.tensor([[end] * (width - len(prompts[row])) + prompts[row] for row in rows])
            mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
            states = DynamicCache()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self._logits(*(one.to(self._model.device) for one in (ids, mask, positions)), states)
            for place, row in enumerate(rows):
                prompt = _Prompt(states, place, len(prompts[row]), logits[place])
                for index, seed in enumerate(seeds):
                    yield _Answer.begin(row, index, prompts[row], names[row], decoding, seed), prompt

    def _step(self, slots, tokens: list[int]) -> Tensor:
        """Read the last token of each answer: logits of the next, (answers, tokens of the tokenizer)."""
        mask, positions = slots.open_column(self._model.device)
        logits = self._logits(torch.tensor(tokens, device=self._model.device)[:, None], mask, positions, slots)
        slots.close_column()
        return logits

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache) -> Tensor:
        """Logits after the last column; rows of the head beyond the tokenizer's tokens are no words, and left out."""
        options = {"position_ids": positions, "logits_to_keep": 1}  # models without positions have no such argument
        options = {key: value for key, value in options.items() if key in self._accepted}
        output = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return output.logits[:, -1, : len(self.tokenizer)].float()


@dataclass(frozen=True)
class _Prompt:
    """A prompt that a model has read: keys and values of several, its row there, its tokens, the logits (V,) of what follows."""

    states: object
    row: int
    length: int
    logits: Tensor


@dataclass
class _Answer:
    """An answer that is being written.

    Attributes:
        prompt: index of its prompt.
        seed: index of its decode seed.
        noise: a uniform number for each position, or None where decoding is greedy.
        ngrams: what it must not repeat, or None.
        tokens: written so far.
    """

    prompt: int
    seed: int
    noise: np.ndarray | None
    ngrams: "Ngrams | None"
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def begin(cls, prompt: int, index: int, ids: list[int], name: str, decoding: Decoding, seed: int) -> "_Answer":
        size = decoding.no_repeat_ngram_size
        sampled = decoding.temperature > 0
        return cls(
            prompt,
            index,
            noise(seed, name, decoding.max_new_tokens) if sampled else None,
            Ngrams(size, ids) if size else None,
        )

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.ngrams is not None:
            self.ngrams.append(token)


def noise(seed: int, name: str, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): a number for each position of an answer, from the decode seed and the record's name alone."""
    return np.random.default_rng(int(files.fingerprint([seed, name]), 16)).random(count)


class Ngrams:
    """The n-grams of a text that grows: what must not follow, lest one is repeated.

    Args:
        size: n, at least 2.
        tokens: the text so far.
    """

    def __init__(self, size: int, tokens: Sequence[int]):
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text grows by a token."""
        if len(self._last) == self._size - 1:
            self._followers.setdefault(self._last, []).append(token)
        self._last = (*self._last, token)[1 - self._size :]

    def forbidden(self) -> list[int]:
        """Tokens that would complete an n-gram which is there already."""
        return self._followers.get(self._last, [])


class _Choice:
    """Chooses the next token of some answers from their logits."""

    def __init__(self, decoding: Decoding):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._greedy = decoding.temperature == 0
        self._warpers = []
        if not self._greedy and decoding.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if not self._greedy and decoding.top_k:
            self._warpers.append(TopKLogitsWarper(decoding.top_k))
        if not self._greedy and decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, answers: Sequence[_Answer], logits: Tensor) -> None:
        """Append a token to each answer; `logits` (answers, V) float32 are used up."""
        for row, answer in enumerate(answers):
            if answer.ngrams is not None and (forbidden := answer.ngrams.forbidden()):
                logits[row, forbidden] = -torch.inf
        for warper in self._warpers:
            logits = warper(None, logits)
        if self._greedy:
            chosen = logits.argmax(-1)
        else:
            numbers = [answer.noise[len(answer.tokens)] for answer in answers]
            chosen = draw(logits, torch.tensor(numbers, dtype=torch.float64, device=logits.device))
        for answer, token in zip(answers, chosen.tolist(), strict=True):
            answer.append(token)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample from the softmax of logits by inverting its distribution function: one number decides a token.

    The probabilities are added up in blocks, then within the block that is hit: a sum over a whole vocabulary is as exact, and slower.

    Args:
        logits: (B, V) float32; -inf is never drawn.
        uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    blocks = functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    bounds = blocks.sum(-1).double().cumsum(-1)
    target = _below(uniform * bounds[:, -1], bounds[:, -1])
    block = (bounds <= target[:, None]).sum(-1, keepdim=True)
    before = functional.pad(bounds, (1, 0)).gather(1, block)[:, 0]
    inner = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double().cumsum(-1)
    # the block's float32 sum and this one may differ in the last digit
    target = _below(target - before, inner[:, -1])
    return block[:, 0] * _BLOCK + (inner <= target[:, None]).sum(-1)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """The value, or the greatest number below the limit."""
    return value.minimum(torch.nextafter(limit, torch.zeros_like(limit)))
