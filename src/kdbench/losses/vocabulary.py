"""The one place where vocabulary-wide tensors are made: a few rows at a time, for every loss."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdbench.signals import Head, Terms

_CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32

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
            the same r rows; returns named losses (r,). Any gradient that it needs to stop, it detaches itself.
        heads: pairs of hidden states (n, d_i) and the head that turns them into logits. All have the same n.
        rows: further tensors (n, ...) to hand to `row_loss`, such as targets; no gradient flows into them.
        weights: factor of each named loss in the total, 1 where none is given.
        diagnostics: names among those of `row_loss` that are only counted: no part of the total.
        chunk: rows at a time; by default as many as make 2^24 logits of the largest head.
        differentiable_rows: further tensors (n, ...) like `rows`, but gradients flow into them.

    Returns:
        The weighted total (differentiable), the unweighted sums by name, and the diagnostics.
    """
    chunk, tensors = _arguments(heads, chunk)
    weights = (weights or {}) | dict.fromkeys(diagnostics, 0.0)
    names: list[str] = []
    settings = row_loss, tuple(rows), weights, chunk, torch.is_grad_enabled(), names, len(differentiable_rows)
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
        chunk: rows at a time; by default as many as make 2^24 logits of the largest head.

    Returns:
        (n, ...), with gradients for hidden states and heads.
    """
    chunk, tensors = _arguments(heads, chunk)
    return _RowsOverVocabulary.apply(row_function, tuple(rows), chunk, *tensors)


def _arguments(heads: Sequence[tuple[Tensor, Head]], chunk: int | None) -> tuple[int, list[Tensor | None]]:
    """Rows at a time, and the tensors that gradients may flow to."""
    counts = [hidden.shape[0] for hidden, _ in heads]
    if len(set(counts)) > 1:
        raise ValueError(f"heads with different numbers of rows: {counts}")
    if chunk is None:
        chunk = max(1, _CHUNK_ELEMENTS // max(head.weight.shape[0] for _, head in heads))
    return chunk, [tensor for hidden, head in heads for tensor in (hidden, head.weight, head.bias)]


def _parts(count: int, chunk: int) -> list[slice]:
    """Consecutive chunks of rows; one without rows where there are none, so that every name and shape is known."""
    return [slice(start, start + chunk) for start in range(0, max(1, count), chunk)]


def _computed_in(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _OverVocabulary(torch.autograd.Function):
    """Tensors come as the differentiable rows, then hidden, weight, bias for each head; `names` is filled with the names of the losses."""

    @staticmethod
    def forward(ctx, row_loss, rows, weights, chunk, trains, names, extra, *tensors):
        wanted = [trains and needed for needed in ctx.needs_input_grad[7:]]
        inputs = [_Input(*of) for of in zip(tensors[:extra], wanted[:extra], strict=True)]
        tensors, wanted = tensors[extra:], wanted[extra:]
        device = tensors[0].device
        compute = _computed_in(device)
        with torch.autocast(device.type, enabled=False):
            heads = [_Projection(*tensors[i : i + 3], *wanted[i : i + 3], compute) for i in range(0, len(tensors), 3)]
            totals = None
            for part in _parts(tensors[0].shape[0], chunk):
                with torch.enable_grad():
                    made = [source.rows(part) for source in (*heads, *inputs)]
                    losses = row_loss(*made[: len(heads)], *(row[part] for row in rows), *made[len(heads) :])
                    weighted = torch.stack([weights.get(name, 1.0) * loss.sum() for name, loss in losses.items()]).sum()
                trained = [pair for pair in zip((*heads, *inputs), made, strict=True) if pair[0].trains]
                if trained and weighted.requires_grad:
                    gradients = torch.autograd.grad(weighted, [of for _, of in trained], allow_unused=True)
                    for (source, _), gradient in zip(trained, gradients, strict=True):
                        if gradient is not None:
                            source.collect(part, gradient)
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
    def forward(ctx, row_function, rows, chunk, *tensors):
        ctx.row_function, ctx.chunk, ctx.compute = row_function, chunk, _computed_in(tensors[0].device)
        ctx.has_bias = [bias is not None for bias in tensors[2::3]]
        ctx.rows = len(rows)
        ctx.save_for_backward(*rows, *(tensor for tensor in tensors if tensor is not None))
        with torch.autocast(tensors[0].device.type, enabled=False):
            heads = [
                _Projection(*tensors[i : i + 3], False, False, False, ctx.compute) for i in range(0, len(tensors), 3)
            ]
            found = [
                row_function(*(head.rows(part) for head in heads), *(row[part] for row in rows))
                for part in _parts(tensors[0].shape[0], chunk)
            ]
        return torch.cat(found)

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
            trained = [head for head in heads if head.trains]
            for part in _parts(tensors[0].shape[0], ctx.chunk):
                with torch.enable_grad():
                    logits = [head.rows(part) for head in heads]
                    found = ctx.row_function(*logits, *(row[part] for row in rows))
                inputs = [made for head, made in zip(heads, logits, strict=True) if head.trains]
                if not found.requires_grad:
                    continue
                gradients = torch.autograd.grad(found, inputs, upstream[part].to(found.dtype), allow_unused=True)
                for head, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:
                        head.collect(part, gradient)
        return None, None, None, *(gradient for head in heads for gradient in head.gradients())


class _Projection:
    """One head over its rows: logits of a chunk, and the gradients that come back, accumulated in float32 or wider."""

    def __init__(self, hidden, weight, bias, train_hidden, train_weight, train_bias, compute):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.compute = compute or torch.promote_types(hidden.dtype, weight.dtype)
        self.matrix = weight.to(self.compute)
        self.wide = wide = torch.promote_types(hidden.dtype, torch.float32)
        self.trains = train_hidden or train_weight or train_bias
        self.to_hidden = torch.zeros_like(hidden) if train_hidden else None
        self.to_weight = torch.zeros_like(weight, dtype=wide) if train_weight else None
        self.to_bias = torch.zeros_like(bias, dtype=wide) if train_bias else None

    def rows(self, part: slice) -> Tensor:
        with torch.no_grad():
            logits = (self.hidden[part].to(self.compute) @ self.matrix.T).to(self.wide)
            if self.bias is not None:
                logits += self.bias
        return logits.requires_grad_(self.trains)

    def collect(self, part: slice, gradient: Tensor) -> None:
        narrow = gradient.to(self.compute)
        if self.to_hidden is not None:
            self.to_hidden[part] = narrow @ self.matrix
        if self.to_weight is not None:
            self.to_weight += narrow.T @ self.hidden[part].to(self.compute)
        if self.to_bias is not None:
            self.to_bias += gradient.sum(0)

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
