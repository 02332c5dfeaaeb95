"""Keys and values of the sequences that a model writes at the same time. Imports transformers: import it where a model is there anyway."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

_SLACK = 64  # columns beyond the longest sequence: the buffers are moved once in so many steps


class Slots(Cache):
    """Places for sequences, in buffers that are allocated once; transformers' models write to it as to any other cache.

    All sequences end in the same column, so they begin in different ones, as in a batch that is padded on the left, and a model needs
    nothing but the usual attention mask and positions. A column more is written in each step; a new sequence takes a free place at any
    time; columns that only finished sequences used are dropped. (transformers' own caches grow by copying all of their content in each
    step, `DynamicCache`, or have one length for all, `StaticCache`; its continuous batching samples by itself, with one generator.)

    Args:
        places: sequences at most.
        longest: tokens of a sequence at most.
    """

    def __init__(self, places: int, longest: int):
        super().__init__(layers=[])
        self.places, self.capacity = places, longest + _SLACK
        self.starts: list[int] = []  # of each sequence, the column of its first token
        self.end = 0  # the column that is written next

    @property
    def begin(self) -> int:
        """The first column that a sequence uses."""
        return min(self.starts, default=self.end)

    def add(self, prefilled: DynamicCache, row: int, length: int) -> None:
        """Give a prompt that a model has read the next free place.

        Args:
            prefilled: its keys and values, padded on the left.
            row: of the prompt in `prefilled`.
            length: of the prompt, tokens.
        """
        if not self.layers:
            self.layers = [_Layer(self, layer.keys, layer.values) for layer in prefilled.layers]
        if not self.starts:
            self.end = length
        elif length > self.end:
            self._move(length)
        place = len(self.starts)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.keys[place, :, self.end - length : self.end] = source.keys[row, :, -length:]
            layer.values[place, :, self.end - length : self.end] = source.values[row, :, -length:]
        self.starts.append(self.end - length)

    def remove(self, place: int) -> None:
        """Free a place; the last sequence moves there."""
        last = len(self.starts) - 1
        if place != last:
            used = slice(self.starts[last], self.end)
            for layer in self.layers:
                layer.keys[place, :, used] = layer.keys[last, :, used]
                layer.values[place, :, used] = layer.values[last, :, used]
            self.starts[place] = self.starts[last]
        self.starts.pop()

    def open_column(self, device) -> tuple[Tensor, Tensor]:
        """Make room for one more token of each sequence.

        Returns:
            attention mask (sequences, columns in use) int64 and positions (sequences, 1) int64 of these tokens.
        """
        if self.end == self.capacity:
            self._move(self.end - self.begin)
        starts = torch.tensor(self.starts, device=device)[:, None]
        mask = torch.arange(self.begin, self.end + 1, device=device)[None] >= starts
        return mask.long(), self.end - starts

    def close_column(self) -> None:
        """All layers have written theirs."""
        self.end += 1

    def _move(self, end: int) -> None:
        begin, width, rows = self.begin, self.end - self.begin, len(self.starts)
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[:rows, :, end - width : end] = states[:rows, :, begin : self.end].clone()
        self.starts = [start + end - self.end for start in self.starts]
        self.end = end


class _Layer(CacheLayerMixin):
    """One layer's buffers, (places, heads, columns, size each).

    Args:
        slots: whose layer it is.
        keys, values: some of its states, for their shapes and type.
    """

    is_sliding = False  # layers with a window keep all columns, too; the attention mask is their window

    def __init__(self, slots: Slots, keys: Tensor, values: Tensor):
        super().__init__()
        self._slots = slots
        self.lazy_initialization(keys, values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros: what is not yet written takes part in the attention with weight 0, which NaN would not survive
        self.keys, self.values = (
            states.new_zeros(self._slots.places, states.shape[1], self._slots.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows, begin, end = len(self._slots.starts), self._slots.begin, self._slots.end
        self.keys[:rows, :, end] = key_states[:, :, 0]
        self.values[:rows, :, end] = value_states[:, :, 0]
        return self.keys[:rows, :, begin : end + 1], self.values[:rows, :, begin : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._slots.end - self._slots.begin

    def get_max_length(self) -> int:
        return self._slots.capacity
