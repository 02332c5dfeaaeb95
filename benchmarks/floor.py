"""What a distillation step is compared with: fine-tuning in the plain published way.

Every sequence is padded to one length (512), the model of transformers is called on the whole batch, labels of prompts and padding are
masked with -100, the cross entropy is taken over the logits of all positions, and AdamW makes the step.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100


def padded(
    sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels, each (B, length) int64.

    Args:
        sequences: token ids of prompt and response.
        prompt_lengths: tokens of each prompt.
        length: what to pad to.
    """
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, MASKED)
    for row, (ids, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        ids = torch.from_numpy(ids.astype(np.int64))
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt : len(ids)] = ids[prompt:]
    return input_ids, attention_mask, labels


def training_step(model, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Forward, backward, update; the loss."""
    input_ids, attention_mask, labels = batch
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=MASKED)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def run(model, batch: tuple[Tensor, Tensor, Tensor], done: Callable[[], None]) -> None:
    """Step after step on one batch; `done` is called before the first and after each, and ends it by an exception."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    done()
    while True:
        training_step(model, optimizer, batch)
        done()
