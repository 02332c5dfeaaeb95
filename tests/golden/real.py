"""The real tokenizers and texts that some golden groups are of, by the names that these use."""

from functools import cache

import pytest

from kdbench import models
from kdbench.data.records import Record, read_jsonl
from kdbench.data.tokens import Tokens, tokenize
from kdbench.settings import Text
from tests.shared import SHARED

FOLDERS = {
    "gpt2": "gpt2",
    "qwen": "qwen1.5-1.8b",
    "tinyllama": "tinyllama-1.1b-3t",
    "mistral": "mistral-7b-v0.1",
    "llama2": "llama2-7b",
}


def require() -> None:
    """Skip a test where the tokenizers or texts are absent; `make test-golden` counts its cases as not checked."""
    for path in (SHARED / "tokenizers", SHARED / "data" / "dolly" / "valid.jsonl"):
        if not path.exists():
            pytest.skip(f"{path} is absent (KDBENCH_SHARED names the folder of shared data and tokenizers)")


@cache
def tokenizer(name: str):
    """The tokenizer of "gpt2", "gpt2/gpt2-base" or the like."""
    return models.load_tokenizer(SHARED / "tokenizers" / FOLDERS[name.split("/")[0]])


@cache
def records() -> list[Record]:
    """data/dolly/valid.jsonl."""
    return read_jsonl(SHARED / "data" / "dolly" / "valid.jsonl")


def text(case: dict) -> Text:
    """The published limits."""
    return Text(template="alpaca", max_prompt_tokens=case["max_prompt_length"], max_tokens=case["max_length"])


def tokens(rows: list[int], student: str, teacher: str, limits: Text) -> Tokens:
    """Some rows in the tokens of both, as the workflow makes them."""
    return tokenize([records()[row] for row in rows], tokenizer(student), tokenizer(teacher), limits)
