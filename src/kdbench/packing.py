"""Forward passes without padding: the tokens of all sequences of a batch one after the other, as one row of T tokens.

Every layer that looks at one token at a time (embeddings, projections, MLPs, norms) then computes T tokens and no more. Attention alone has
to see the sequences apart: `attention` below takes the place of transformers' own for models that `enable` was called for. Their other
uses (a padded batch, generation) stay as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.data.batches import Side

IMPLEMENTATION = "kdbench_packed"  # the name under which transformers knows `attention`


@dataclass(frozen=True)
class Sequences:
    """What attention has to know of the sequences of a batch.

    Attributes:
        lengths: (B,) tokens of each.
        slots: (T,) int64, each token's place in a flattened (B, longest) batch that is padded on the right.
    """

    lengths: tuple[int, ...]
    slots: Tensor

    @classmethod
    def of(cls, side: Side) -> "Sequences":
        """Those of one side of a batch."""
        starts = torch.arange(len(side.lengths)) * max(side.lengths)
        begins = starts.repeat_interleave(torch.tensor(side.lengths)).to(side.position_ids.device, non_blocking=True)
        return cls(side.lengths, begins + side.position_ids)

    def padded(self, values: Tensor) -> Tensor:
        """(T, ...) -> (B, longest, ...), with 0 for padding."""
        count, longest = len(self.lengths), max(self.lengths)
        empty = values.new_zeros(count * longest, *values.shape[1:])
        return empty.index_copy(0, self.slots, values).unflatten(0, (count, longest))

    def packed(self, values: Tensor) -> Tensor:
        """(B, longest, ...) -> (T, ...), without the padding."""
        return values.flatten(0, 1).index_select(0, self.slots)


def states(transformer: nn.Module, side: Side) -> Tensor:
    """Final hidden states (T, d) of a model's part below its head: packed where `enable` said so, else by way of a padded batch."""
    sequences = Sequences.of(side)
    if transformer.config._attn_implementation != IMPLEMENTATION:
        mask = sequences.padded(torch.ones_like(side.input_ids))
        found = transformer(input_ids=sequences.padded(side.input_ids), attention_mask=mask, use_cache=False)
        return sequences.packed(found.last_hidden_state)
    return transformer(
        input_ids=side.input_ids[None],
        position_ids=side.position_ids[None],
        # A mask of four dimensions is handed on to `attention` as it is; without it transformers would build one of T × T.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=side.input_ids.device),
        sequences=sequences,
        use_cache=False,
    ).last_hidden_state[0]


def attention(module, query, key, value, attention_mask, sequences: Sequences | None = None, **options):
    """Causal attention within each sequence of a packed batch; transformers' own where the batch is not packed.

    On a CPU each sequence is computed by itself, so that nothing is wasted. A GPU would wait for many small kernels: there the sequences
    are computed together.

    Args:
        module: the attention layer that calls.
        query: (1, heads, T, d) of a packed batch.
        key: (1, heads or fewer, T, d).
        value: the same.
        attention_mask: not read where the batch is packed.
        sequences: of a packed batch.
        options: `dropout`, `scaling`, `sliding_window` and what else transformers hands to attention functions.

    Returns:
        (1, T, heads, d), and None for the attention's weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def causal(query, key, value):
        band = _band(query, options.get("sliding_window"))
        return sdpa_attention_forward(module, query, key, value, band, is_causal=True, **options)[0]

    way = apart if query.device.type == "cpu" else together
    return way(causal, sequences, query, key, value), None


def apart(causal: Callable, sequences: Sequences, *states: Tensor) -> Tensor:
    """Attention sequence by sequence.

    Args:
        causal: attention of (B, heads, L, d) queries, keys and values; gives (B, L, heads, d).
        sequences: of the packed batch.
        states: its queries, keys and values, each (1, heads, T, d).

    Returns:
        (1, T, heads, d).
    """
    parts = zip(*(of.split(sequences.lengths, dim=2) for of in states), strict=True)
    return torch.cat([causal(*part) for part in parts], dim=1)


def together(causal: Callable, sequences: Sequences, *states: Tensor) -> Tensor:
    """The same as `apart`, of all sequences at once. They are padded on the right, where no token of theirs looks."""
    padded = (sequences.padded(of[0].transpose(0, 1)).transpose(1, 2) for of in states)
    return sequences.packed(causal(*padded))[None]


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask (1, 1, L, L) of tokens that see themselves and `window` - 1 before; None where plain causal attention is the same."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]


def enable(transformer: nn.Module) -> bool:
    """Let a model read packed batches from now on, if it can.

    It can if transformers' own scaled dot product attention is what it uses, through the interface that lets others take its place, and
    if the states of two packed sequences then are those of the padded batch: code that counts positions itself, or keeps a state across
    tokens, shows there.

    Args:
        transformer: a transformers model without its head, on any device.

    Returns:
        Whether it can; if not, it is as it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = transformer.config._attn_implementation
    if before == IMPLEMENTATION:
        return True
    if before != "sdpa" or not transformer.is_backend_compatible():
        return False
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # for batches that are not packed
    side = _example(transformer)
    training = transformer.training
    transformer.eval()  # dropout would differ between the two passes
    with torch.no_grad():
        expected = states(transformer, side)
        transformer.set_attn_implementation(IMPLEMENTATION)
        try:
            found = states(transformer, side)
        except (TypeError, ValueError, RuntimeError):  # it takes no `position_ids`, or looks at the mask
            found = torch.full_like(expected, torch.nan)
    transformer.train(training)
    scale = 1e-4 if expected.dtype.itemsize >= 4 else 2e-2
    able = (found - expected).abs().max() <= scale * expected.abs().max()
    if not able:
        transformer.set_attn_implementation(before)
    return bool(able)


def _example(transformer: nn.Module) -> Side:
    """Three sequences of different lengths, of different ids where the vocabulary has so many."""
    lengths = (2, 5, 4)
    table = transformer.get_input_embeddings().weight
    ids = torch.arange(sum(lengths), device=table.device) % table.shape[0]
    places = torch.cat([torch.arange(length) for length in lengths]).to(table.device)
    none = ids[:0]
    return Side(ids, places, lengths, none, none, none, none)
