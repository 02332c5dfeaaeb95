"""The one place where vocabulary-wide tensors are made: a few rows at a time, for every loss."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdbench.signals import Head, Terms

# Logits of one chunk, which is what the products see: with fewer rows they would wait for the head's weights, not compute.
_CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**26}
# Logits of one piece of a chunk, which is what a loss sees. Its many passes are over memory that the processor's cache holds, and that
# is small enough not to be given back to the system, and cleared anew, for every tensor.
_PIECE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}

# Rows of the head, for each thread of a CPU, that one product takes on the way to the logits and back to the states: with all of them at
# once they reach three and four fifths of the speed.
_SLAB = 256
_SLAB_BACK = 8192

RowLoss = Callable[..., dict[str, Tensor]]


def over_vocabulary(
    row_loss: RowLoss,
    heads: Sequence[tuple[Tensor, Head]],
    rows: Sequence[Tensor] = (),
    weights: dict[str, float] | None = None,
    diagnostics: Collection[str] = (),
    chunk: int | None = None,
    differentiable_rows: Sequence[Tensor] = (),
) -> Terms:
    """Sum a row-wise loss over rows of logits without ever holding more than `chunk` rows of them.

    The gradient with respect to hidden states and head weights is computed with the loss, chunk by chunk, and only scaled in the
    backward pass; a tensor that requires no gradient costs nothing. Values and gradients equal those of the plain formula; second
    derivatives are refused. Products are computed in autocast's type where it is on, else in the wider type of hidden state and weight.

    Args:
        row_loss: plain function of logits (r, V_i), one per head, float32 or wider, and then of `rows` and `differentiable_rows` cut to
            the same r rows; returns named losses (r,). Any gradient that it needs to stop, it detaches itself. It is called for all
            rows once, from the first to the last.
        heads: pairs of hidden states (n, d_i) and the head that turns them into logits. All have the same n.
        rows: further tensors (n, ...) to hand to `row_loss`, such as targets; no gradient flows into them.
        weights: factor of each named loss in the total, 1 where none is given.
        diagnostics: names among those of `row_loss` that are only counted: no part of the total.
        chunk: rows at a time; by default as many as make 2^25 logits of the largest head on a CPU, 2^26 on a GPU.
        differentiable_rows: further tensors (n, ...) like `rows`, but gradients flow into them.

    Returns:
        The weighted total (differentiable), the unweighted sums by name, and the diagnostics.
    """
    rows_at_a_time, tensors = _arguments(heads, chunk)
    weights = (weights or {}) | dict.fromkeys(diagnostics, 0.0)
    names: list[str] = []
    settings = row_loss, tuple(rows), weights, rows_at_a_time, torch.is_grad_enabled(), names, len(differentiable_rows)
    total, sums = _OverVocabulary.apply(*settings, *differentiable_rows, *tensors)
    found = dict(zip(names, sums, strict=True))
    return Terms(
        total,
        {name: value for name, value in found.items() if name not in diagnostics},
        {name: value for name, value in found.items() if name in diagnostics},
    )


def rows_over_vocabulary(
    row_function: Callable[..., Tensor],
    heads: Sequence[tuple[Tensor, Head]],
    rows: Sequence[Tensor] = (),
    chunk: int | None = None,
) -> Tensor:
    """Something small of each row of logits, for losses that are no sum over rows: a probability, the largest k of them.

    Logits are made a chunk of rows at a time, and a second time in the backward pass; they are not kept in between. What `over_vocabulary`
    says of gradients and types holds here too.

    Args:
        row_function: plain function of logits (r, V_i), one per head, and of `rows` cut to the same r rows; returns (r, ...).
        heads: pairs of hidden states (n, d_i) and the head that turns them into logits. All have the same n.
        rows: further tensors (n, ...) for `row_function`; no gradient flows into them.
        chunk: rows at a time; by default as many as make 2^25 logits of the largest head on a CPU, 2^26 on a GPU.

    Returns:
        (n, ...), with gradients for hidden states and heads.
    """
    rows_at_a_time, tensors = _arguments(heads, chunk)
    return _RowsOverVocabulary.apply(row_function, tuple(rows), rows_at_a_time, *tensors)


def logits_at(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """Logits of some tokens of each row alone, by as many products of vectors; for tokens that are known, far fewer than the vocabulary.

    Rows of the head are gathered for a few rows at a time, and again in the backward pass. Types are those of `over_vocabulary`.

    Args:
        hidden: (n, d).
        head: of V rows.
        tokens: (n, k) int64.

    Returns:
        (n, k), float32 or wider, with gradients for hidden states and head.
    """
    rows_at_a_time = max(1, _PIECE_ELEMENTS[_kind(hidden)] // max(1, tokens.shape[1] * hidden.shape[1]))
    return _LogitsAt.apply(tokens, rows_at_a_time, _computed_in(hidden.device), hidden, head.weight, head.bias)


def of_tokens(logits: Tensor, size: int) -> Tensor:
    """Logits of the tokenizer's tokens: (r, V) -> (r, size). Where the head has no further rows it is the same tensor, for even such a
    slice would cost a copy in the backward pass."""
    return logits if logits.shape[1] == size else logits[:, :size]


def _arguments(heads: Sequence[tuple[Tensor, Head]], chunk: int | None) -> tuple[tuple[int, int], list[Tensor | None]]:
    """Rows of a chunk and of a piece, and the tensors that gradients may flow to."""
    counts = [hidden.shape[0] for hidden, _ in heads]
    if len(set(counts)) > 1:
        raise ValueError(f"heads with different numbers of rows: {counts}")
    kind = _kind(heads[0][0])
    widest = max(head.weight.shape[0] for _, head in heads)
    chunk = chunk or max(1, _CHUNK_ELEMENTS[kind] // widest)
    piece = min(chunk, max(1, _PIECE_ELEMENTS[kind] // widest))
    return (chunk, piece), [tensor for hidden, head in heads for tensor in (hidden, head.weight, head.bias)]


def _kind(of: Tensor) -> str:
    return "cpu" if of.device.type == "cpu" else "cuda"


def _parts(count: int, size: int) -> list[slice]:
    """Consecutive parts of so many rows; one without rows where there are none, so that every name and shape is known."""
    return [slice(start, min(start + size, count)) for start in range(0, max(1, count), size)]


def _computed_in(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _OverVocabulary(torch.autograd.Function):
    """Tensors come as the differentiable rows, then hidden, weight, bias for each head; `names` is filled with the names of the losses."""

    @staticmethod
    def forward(ctx, row_loss, rows, weights, rows_at_a_time, trains, names, extra, *tensors):
        wanted = [trains and needed for needed in ctx.needs_input_grad[7:]]
        inputs = [_Input(*of) for of in zip(tensors[:extra], wanted[:extra], strict=True)]
        tensors, wanted = tensors[extra:], wanted[extra:]
        device = tensors[0].device
        compute = _computed_in(device)
        with torch.autocast(device.type, enabled=False):
            heads = [_Projection(*tensors[i : i + 3], *wanted[i : i + 3], compute) for i in range(0, len(tensors), 3)]
            totals = None
            for piece, made in _pieces(heads, tensors[0].shape[0], rows_at_a_time):
                with torch.enable_grad():
                    further = [source.rows(piece) for source in inputs]
                    losses = row_loss(*made, *(row[piece] for row in rows), *further)
                    weighted = torch.stack([weights.get(name, 1.0) * loss.sum() for name, loss in losses.items()]).sum()
                _differentiate(weighted, None, (*heads, *inputs), (*made, *further), piece)
                found = torch.stack([loss.detach().sum() for loss in losses.values()])
                totals = found if totals is None else totals + found
        names[:] = losses
        factors = torch.tensor([weights.get(name, 1.0) for name in names], dtype=totals.dtype, device=device)
        ctx.gradients = [gradient for source in (*inputs, *heads) for gradient in source.gradients()]
        ctx.mark_non_differentiable(totals)
        return (factors * totals).sum(), totals

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        scaled = [None if gradient is None else gradient * upstream.to(gradient.dtype) for gradient in ctx.gradients]
        return *[None] * 7, *scaled


class _RowsOverVocabulary(torch.autograd.Function):
    """Tensors come as hidden, weight, bias for each head."""

    @staticmethod
    def forward(ctx, row_function, rows, rows_at_a_time, *tensors):
        ctx.row_function, ctx.rows_at_a_time, ctx.compute = (
            row_function,
            rows_at_a_time,
            _computed_in(tensors[0].device),
        )
        ctx.has_bias = [bias is not None for bias in tensors[2::3]]
        ctx.rows = len(rows)
        ctx.save_for_backward(*rows, *(tensor for tensor in tensors if tensor is not None))
        with torch.autocast(tensors[0].device.type, enabled=False):
            heads = [
                _Projection(*tensors[i : i + 3], False, False, False, ctx.compute) for i in range(0, len(tensors), 3)
            ]
            pieces = _pieces(heads, tensors[0].shape[0], rows_at_a_time)
            return torch.cat([row_function(*made, *(row[piece] for row in rows)) for piece, made in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        saved = iter(ctx.saved_tensors)
        rows = [next(saved) for _ in range(ctx.rows)]
        tensors = [
            tensor for bias in ctx.has_bias for tensor in (next(saved), next(saved), next(saved) if bias else None)
        ]
        wanted = ctx.needs_input_grad[3:]
        with torch.autocast(upstream.device.type, enabled=False):
            heads = [
                _Projection(*tensors[i : i + 3], *wanted[i : i + 3], ctx.compute) for i in range(0, len(tensors), 3)
            ]
            for piece, made in _pieces(heads, tensors[0].shape[0], ctx.rows_at_a_time):
                with torch.enable_grad():
                    found = ctx.row_function(*made, *(row[piece] for row in rows))
                _differentiate(found, upstream[piece].to(found.dtype), heads, made, piece)
        return None, None, None, *(gradient for head in heads for gradient in head.gradients())


class _LogitsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, rows_at_a_time, compute, hidden, weight, bias):
        compute = compute or torch.promote_types(hidden.dtype, weight.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.settings, ctx.bias = (rows_at_a_time, compute, wide), bias
        ctx.save_for_backward(tokens, hidden, weight)
        found = hidden.new_empty(tokens.shape, dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(tokens), rows_at_a_time):
                rows = weight[tokens[part]].to(compute)
                found[part] = (rows @ hidden[part].to(compute)[:, :, None])[:, :, 0]
                if bias is not None:
                    found[part] += bias[tokens[part]]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (rows_at_a_time, compute, wide), (tokens, hidden, weight) = ctx.settings, ctx.saved_tensors
        trains_hidden, trains_weight, trains_bias = ctx.needs_input_grad[3:]
        to_hidden = torch.zeros_like(hidden) if trains_hidden else None
        to_weight = torch.zeros_like(weight, dtype=wide) if trains_weight else None
        to_bias = torch.zeros_like(ctx.bias, dtype=wide) if trains_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(tokens), rows_at_a_time):
                if to_hidden is not None:
                    rows = weight[tokens[part]].to(compute)
                    to_hidden[part] = (upstream[part].to(compute)[:, None, :] @ rows)[:, 0]
                if to_weight is not None:
                    rows = upstream[part][:, :, None] * hidden[part].to(wide)[:, None, :]
                    to_weight.index_add_(0, tokens[part].flatten(), rows.flatten(0, 1))
        if to_weight is not None:
            to_weight = to_weight.to(weight.dtype)
        if to_bias is not None:
            to_bias = to_bias.index_add_(0, tokens.flatten(), upstream.flatten()).to(ctx.bias.dtype)
        return None, None, None, to_hidden, to_weight, to_bias


def _pieces(
    heads: "Sequence[_Projection]", count: int, rows_at_a_time: tuple[int, int]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The logits of all heads, piece by piece; what the heads collected of a chunk becomes gradients when its pieces are done."""
    chunk, size = rows_at_a_time
    number = max(1, -(-count // chunk))
    for whole in _parts(
        count, max(1, -(-count // number))
    ):  # of one size: a product with few rows waits for the head's weights
        for head in heads:
            head.begin(whole)
        for part in _parts(whole.stop - whole.start, size):
            piece = slice(whole.start + part.start, whole.start + part.stop)
            yield piece, [head.rows(piece) for head in heads]
        for head in heads:
            head.end()


def _differentiate(value: Tensor, upstream: Tensor | None, sources: Sequence, made: Sequence[Tensor], piece: slice):
    """Hand the gradients of a value for what the sources made of a piece to those of them that train."""
    trained = [pair for pair in zip(sources, made, strict=True) if pair[0].trains]
    if not trained or not value.requires_grad:
        return
    gradients = torch.autograd.grad(value, [of for _, of in trained], upstream, allow_unused=True)
    for (source, _), gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            source.collect(piece, gradient)


def _product(hidden: Tensor, matrix: Tensor) -> Tensor:
    """hidden @ matrix.T, (r, d) and (V, d) -> (r, V); without gradient."""
    if hidden.device.type != "cpu":
        return hidden @ matrix.T
    logits = hidden.new_empty(len(hidden), len(matrix))
    for slab in _parts(len(matrix), _SLAB * torch.get_num_threads()):
        torch.mm(hidden, matrix[slab].T, out=logits[:, slab])
    return logits


def _back(gradient: Tensor, matrix: Tensor) -> Tensor:
    """gradient @ matrix, (r, V) and (V, d) -> (r, d); without gradient."""
    if gradient.device.type != "cpu" or gradient.dtype not in (torch.float32, torch.float64):
        return gradient @ matrix
    found = gradient.new_zeros(len(gradient), matrix.shape[1])
    for slab in _parts(len(matrix), _SLAB_BACK * torch.get_num_threads()):
        found.addmm_(gradient[:, slab], matrix[slab])
    return found


class _Projection:
    """One head over its rows: logits of a chunk, and the gradients that come back, accumulated in float32 or wider.

    The gradient of a piece takes the place of its logits, which nobody needs any more, so that the products for a whole chunk follow.
    """

    def __init__(self, hidden, weight, bias, train_hidden, train_weight, train_bias, compute):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.compute = compute or torch.promote_types(hidden.dtype, weight.dtype)
        self.matrix = weight.to(self.compute)
        self.wide = wide = torch.promote_types(hidden.dtype, torch.float32)
        self.trains = train_hidden or train_weight or train_bias
        self.to_hidden = torch.zeros_like(hidden) if train_hidden else None
        self.to_weight = torch.zeros_like(weight, dtype=wide) if train_weight else None
        self.to_bias = torch.zeros_like(bias, dtype=wide) if train_bias else None

    def begin(self, chunk: slice) -> None:
        with torch.no_grad():
            self.chunk, self.collected = chunk, False
            self.logits = _product(self.hidden[chunk].to(self.compute), self.matrix).to(self.wide)
            if self.bias is not None:
                self.logits += self.bias

    def _own(self, piece: slice) -> Tensor:
        return self.logits[piece.start - self.chunk.start : piece.stop - self.chunk.start]

    def rows(self, piece: slice) -> Tensor:
        return self._own(piece).detach().requires_grad_(self.trains)

    def collect(self, piece: slice, gradient: Tensor) -> None:
        self._own(piece).copy_(gradient)
        self.collected = True

    def end(self) -> None:
        if self.collected:
            narrow = self.logits.to(self.compute)
            if self.to_hidden is not None:
                self.to_hidden[self.chunk] = _back(narrow, self.matrix)
            if self.to_weight is not None:
                hidden = self.hidden[self.chunk].to(self.compute)
                if self.to_weight.dtype == self.compute:
                    self.to_weight.addmm_(narrow.T, hidden)
                else:
                    self.to_weight += narrow.T @ hidden
            if self.to_bias is not None:
                self.to_bias += self.logits.sum(0)
        self.logits = None

    def gradients(self):
        to_weight = None if self.to_weight is None else self.to_weight.to(self.weight.dtype)
        to_bias = None if self.to_bias is None else self.to_bias.to(self.bias.dtype)
        return self.to_hidden, to_weight, to_bias


class _Input:
    """A tensor with a value for each row, and the gradient that comes back."""

    def __init__(self, values, trains):
        self.values, self.trains = values, trains
        self.gradient = torch.zeros_like(values) if trains else None

    def rows(self, part: slice) -> Tensor:
        return self.values[part].detach().requires_grad_(self.trains)

    def collect(self, part: slice, gradient: Tensor) -> None:
        self.gradient[part] = gradient

    def gradients(self):
        return (self.gradient,)
