"""Sizes of the models that the benchmark measures on, and whether they read real records.

Weights are random: a step costs the same whatever they are.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

POSITIONS = 1024
SEED = 1  # of the draw of the records, of the weights and of the training
TOKENIZERS = ("gpt2", "qwen1.5-1.8b", "tinyllama-1.1b-3t")  # real ones, of 50,257, 151,646 and 32,000 tokens
PADDED = 512  # tokens that the published trainers pad every sequence to


@dataclass(frozen=True)
class Shapes:
    """A student, a teacher, and the data they read.

    Attributes:
        student: keys of the student's architecture: GPT2 without dropout (see docs/benchmarks.md), but for `vocab_size`.
        teacher: keys of the teacher's: Qwen2 with a head of its own, but for `vocab_size`.
        vocabularies: rows of the student's head and of the teacher's that reads with another tokenizer.
        trained: tokens of the two tokenizers that are trained where the real ones are absent.
        real: whether Dolly records and the real tokenizers are used where they are present.
    """

    student: dict
    teacher: dict
    vocabularies: tuple[int, int]
    trained: tuple[int, int]
    real: bool


def _gpt2(width: int, layers: int, heads: int) -> dict:
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": POSITIONS} | still


def _qwen2(width: int, inner: int, layers: int, heads: int) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": POSITIONS}
    return {"model_type": "qwen2", "tie_word_embeddings": False} | sizes


FULL = Shapes(_gpt2(256, 4, 4), _qwen2(512, 1408, 6, 8), (50_257, 151_936), (4000, 6000), real=True)
TINY = Shapes(_gpt2(16, 2, 2), _qwen2(24, 32, 2, 2), (400, 500), (300, 350), real=False)
SHAPES = {"full": FULL, "tiny": TINY}


def with_vocabulary(shapes: Shapes, rows: int) -> Shapes:
    """The same models with so many rows in every head."""
    return replace(shapes, vocabularies=(rows, rows))


def shared() -> Path:
    """Where real data and tokenizers lie if they are there at all."""
    return Path(os.environ.get("KDBENCH_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def is_real(shapes: Shapes) -> bool:
    """Whether the records and tokenizers are real ones."""
    wanted = [
        shared() / "data" / "dolly" / "train.jsonl",
        *(shared() / "tokenizers" / name for name in TOKENIZERS),
    ]
    return shapes.real and all(path.exists() for path in wanted)
