"""Small real models and random token sequences."""

import numpy as np
import torch

from kdbench.data.batches import Side
from kdbench.data.tokens import TokenSide


def gpt2(vocabulary: int = 40, width: int = 16, seed: int = 0, positions: int = 64):
    """A GPT2 of two layers (tied head, learned positions) without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.4,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def qwen2(vocabulary: int = 40, width: int = 24, seed: int = 1, tied: bool = False):
    """A Qwen2 of two layers (own head unless tied, rotary positions, biases in the attention)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def llama(vocabulary: int = 40, width: int = 24, seed: int = 1, tied: bool = False):
    """A LLaMA of two layers (own head unless tied, rotary positions, no bias)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mistral(vocabulary: int = 40, width: int = 24, seed: int = 1):
    """A Mistral of two layers (own head, rotary positions, a window of 8 tokens for the attention)."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, sliding_window=8, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def opt(vocabulary: int = 40, width: int = 24, seed: int = 1):
    """An OPT of two layers without dropout: tied head, learned positions that start at 2, layers that lead from embeddings of 12 to the
    width and back, as OPT-350m has them."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=12, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, init_std=0.4, dropout=0.0, do_layer_norm_before=False,
        pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def tokens(vocabulary: int, lengths=((3, 5), (7, 2), (2, 9), (5, 1), (4, 4)), seed: int = 2) -> TokenSide:
    """One side of a tokenised data set: random sequences with (prompt, response) lengths; tokens of one byte."""
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(1, vocabulary, prompt + response) for prompt, response in lengths]
    return TokenSide(
        ids=np.concatenate(sequences).astype(np.int32),
        starts=np.cumsum([0, *map(len, sequences)]),
        prompt_lengths=np.array([prompt for prompt, _ in lengths], np.int32),
        ends=np.concatenate([np.arange(1, response + 1) for _, response in lengths]).astype(np.int32),
    )


def side(data, rows) -> Side:
    """The tensors of some records, written position by position."""
    ids, places, lengths, positions, targets, sequence = [], [], [], [], [], []
    for i, row in enumerate(rows):
        record = data.ids[data.starts[row] : data.starts[row + 1]].tolist()
        for place, token in enumerate(record):
            if place >= data.prompt_lengths[row]:
                positions.append(len(ids) - 1)
                targets.append(token)
                sequence.append(i)
            ids.append(token)
            places.append(place)
        lengths.append(len(record))
    sequence = torch.tensor(sequence)
    counts = torch.bincount(sequence, minlength=len(rows))
    return Side(
        *map(torch.tensor, (ids, places)), tuple(lengths), *map(torch.tensor, (positions, targets)), sequence, counts
    )
