"""The vocabulary kernel: numbers of the plain formula, memory of a chunk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdbench.losses import vocabulary
from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.losses.divergences import forward_kl
from kdbench.losses.vocabulary import logits_at, over_vocabulary, rows_over_vocabulary
from kdbench.signals import Head


class NewTensors(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation allocates, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                self.sizes.append(result.numel())
        return results


def _problem(n=11, vocabulary=23, width=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    student = random(n, width), Head(random(vocabulary, width), vocabulary, random(vocabulary))
    teacher = random(n, width + 2), Head(random(vocabulary, width + 2), vocabulary)
    return student, teacher, torch.randint(vocabulary, (n,), generator=generator)


def _row_loss(z_s, z_t, targets):
    return {"ce": cross_entropy(z_s, targets), "kd": forward_kl(z_s, z_t, 2.0)}


WEIGHTS = {"ce": 0.3, "kd": 1.7}


@pytest.mark.parametrize(
    ("chunk", "piece"), [(None, None), (1, 1), (4, 4), (4, 1), (5, 3), (11, 2), (11, 11), (100, 4)]
)
def test_values_and_all_gradients_equal_the_plain_formula(chunk, piece, monkeypatch):
    if piece:
        monkeypatch.setitem(vocabulary._PIECE_ELEMENTS, "cpu", piece * 23)
        monkeypatch.setattr(vocabulary, "_SLAB", 1 + piece)
        monkeypatch.setattr(vocabulary, "_SLAB_BACK", 2 + piece)
    (h_s, head_s), (h_t, head_t), targets = _problem()
    leaves = [h_s, head_s.weight, head_s.bias, h_t, head_t.weight]
    for leaf in leaves:
        leaf.requires_grad_()
    terms = over_vocabulary(_row_loss, [(h_s, head_s), (h_t, head_t)], [targets], WEIGHTS, chunk=chunk)
    ours = torch.autograd.grad(2.5 * terms.total, leaves)
    plain = {
        name: values.sum()
        for name, values in _row_loss(h_s @ head_s.weight.T + head_s.bias, h_t @ head_t.weight.T, targets).items()
    }
    total = sum(WEIGHTS[name] * value for name, value in plain.items())
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    assert terms.sums.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(terms.sums[name], value.detach(), rtol=1e-12, atol=0)
        assert not terms.sums[name].requires_grad
    for gradient, expected in zip(ours, torch.autograd.grad(2.5 * total, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk):
    (h_s, head_s), (h_t, head_t), targets = _problem(n=40, vocabulary=1000, width=2)
    h_s.requires_grad_()
    seen = []

    def row_loss(z_s, z_t, targets):
        seen.extend([tuple(z_s.shape), tuple(z_t.shape)])
        return _row_loss(z_s, z_t, targets)

    with NewTensors() as made:
        over_vocabulary(row_loss, [(h_s, head_s), (h_t, head_t)], [targets], chunk=chunk).total.backward()
    assert all(rows <= chunk and size == 1000 for rows, size in seen)
    assert sum(rows for rows, _ in seen) == 2 * 40
    assert max(made.sizes) == chunk * 1000


def test_default_chunk_bounds_the_logits(monkeypatch):
    monkeypatch.setitem(vocabulary._CHUNK_ELEMENTS, "cpu", 7 * 23)
    seen = []
    (h_s, head_s), _, targets = _problem()
    over_vocabulary(lambda z, y: seen.append(len(z)) or {"ce": cross_entropy(z, y)}, [(h_s, head_s)], [targets])
    assert seen == [6, 5]  # two parts of one size, rather than 7 and 4


def _sizes_made(trains_head, grad=True):
    (h_s, head_s), _, targets = _problem(n=6, vocabulary=50, width=30)
    h_s.requires_grad_()
    head_s.weight.requires_grad_(trains_head)
    with torch.set_grad_enabled(grad), NewTensors() as made:
        terms = over_vocabulary(lambda z, y: {"ce": cross_entropy(z, y)}, [(h_s, head_s)], [targets], chunk=2)
        if grad:
            terms.total.backward()
    return made.sizes


def test_a_frozen_head_costs_no_gradient():
    assert 50 * 30 in _sizes_made(trains_head=True)
    assert 50 * 30 not in _sizes_made(trains_head=False)


def test_without_gradients_none_is_computed():
    sizes = _sizes_made(trains_head=True, grad=False)
    assert 50 * 30 not in sizes
    assert 6 * 30 not in sizes


def test_gradients_of_bfloat16_are_summed_in_float32():
    """2,048 equal contributions: a sum in bfloat16 stands still after the 256th."""
    n, width, vocabulary = 2048, 4, 8
    hidden = torch.ones(n, width, dtype=torch.bfloat16)
    weight = torch.zeros(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    terms = over_vocabulary(
        lambda z, y: {"ce": cross_entropy(z, y)},
        [(hidden, Head(weight, vocabulary))],
        [torch.zeros(n, dtype=torch.long)],
        chunk=1,
    )
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    expected = torch.full((vocabulary, width), n / vocabulary)
    expected[0] = n / vocabulary - n
    torch.testing.assert_close(weight.grad.float(), expected, rtol=4e-3, atol=0)


def test_autocast_multiplies_in_its_own_type_and_hands_float32_to_the_loss():
    (h_s, head_s), _, targets = _problem(dtype=torch.float32)
    leaves = [h_s.requires_grad_(), head_s.weight.requires_grad_()]
    dtypes = []

    def row_loss(z, targets):
        dtypes.append(z.dtype)
        return {"ce": cross_entropy(z, targets)}

    with torch.autocast("cpu", torch.bfloat16):
        narrow = over_vocabulary(row_loss, [(h_s, head_s)], [targets]).total
    wide = over_vocabulary(row_loss, [(h_s, head_s)], [targets]).total
    assert dtypes == [torch.float32, torch.float32]
    assert narrow != wide
    torch.testing.assert_close(narrow, wide, rtol=1e-2, atol=0)
    for got, expected in zip(torch.autograd.grad(narrow, leaves), torch.autograd.grad(wide, leaves), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_states_of_bfloat16_meet_a_float32_head_in_float32():
    (h_s, head_s), _, targets = _problem(dtype=torch.float32)
    narrow = h_s.bfloat16()
    ours = over_vocabulary(lambda z, y: {"ce": cross_entropy(z, y)}, [(narrow, head_s)], [targets]).total
    plain = cross_entropy(narrow.float() @ head_s.weight.T + head_s.bias, targets).sum()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


def test_diagnostics_are_counted_and_no_part_of_the_loss():
    (h_s, head_s), _, targets = _problem()

    def row_loss(z, targets):
        return {"ce": cross_entropy(z, targets), "correct": correct(z, targets)}

    terms = over_vocabulary(row_loss, [(h_s, head_s)], [targets], diagnostics=["correct"], chunk=2)
    assert terms.sums.keys() == {"ce"}
    torch.testing.assert_close(terms.total, terms.sums["ce"])
    logits = h_s @ head_s.weight.T + head_s.bias
    assert terms.diagnostics["correct"].item() == (logits.argmax(-1) == targets).sum()


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_differentiable_rows_get_the_gradient_of_the_plain_formula(chunk):
    (h_s, head_s), (h_t, head_t), targets = _problem()
    factor = torch.rand(11, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [factor, h_s.requires_grad_(), head_s.weight.requires_grad_()]

    def row_loss(z_s, z_t, targets, factor):
        found = _row_loss(factor[:, :1] * z_s, z_t, targets)
        return {"ce": factor[:, 1] * found["ce"], "kd": found["kd"]}

    def scaled():  # depends on the states, which the gradient then reaches in two ways
        return factor * h_s.sum(-1, keepdim=True).tanh()

    terms = over_vocabulary(
        row_loss, [(h_s, head_s), (h_t, head_t)], [targets], WEIGHTS, chunk=chunk, differentiable_rows=[scaled()]
    )
    logits = h_s @ head_s.weight.T + head_s.bias, h_t @ head_t.weight.T
    plain = sum(WEIGHTS[name] * loss.sum() for name, loss in row_loss(*logits, targets, scaled()).items())
    torch.testing.assert_close(terms.total, plain, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(3 * total, leaves) for total in (terms.total, plain))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


def test_differentiable_rows_alone_train():
    """No head needs a gradient, and a row that needs none gets none."""
    (h_s, head_s), _, targets = _problem()
    factor, fixed = torch.ones(11, dtype=torch.float64, requires_grad=True), torch.ones(11, dtype=torch.float64)
    terms = over_vocabulary(
        lambda z, y, a, b: {"ce": a * b * cross_entropy(z, y)},
        [(h_s, head_s)],
        [targets],
        chunk=2,
        differentiable_rows=[factor, fixed],
    )
    (gradient,) = torch.autograd.grad(terms.total, factor)
    torch.testing.assert_close(gradient, cross_entropy(h_s @ head_s.weight.T + head_s.bias, targets))
    assert fixed.grad is None


def test_no_rows_give_a_loss_of_zero():
    (h_s, head_s), (h_t, head_t), targets = _problem(n=0)
    h_s.requires_grad_()
    head_s.weight.requires_grad_()
    terms = over_vocabulary(_row_loss, [(h_s, head_s), (h_t, head_t)], [targets])
    terms.total.backward()
    assert terms.total.item() == 0
    assert not head_s.weight.grad.any()


def test_a_second_derivative_is_refused():
    (h_s, head_s), _, targets = _problem()
    h_s.requires_grad_()
    total = over_vocabulary(lambda z, y: {"ce": cross_entropy(z, y)}, [(h_s, head_s)], [targets]).total
    (gradient,) = torch.autograd.grad(total**2, h_s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_heads_of_different_lengths_are_refused():
    (h_s, head_s), (h_t, head_t), targets = _problem()
    with pytest.raises(ValueError, match=r"\[11, 10\]"):
        over_vocabulary(_row_loss, [(h_s, head_s), (h_t[1:], head_t)], [targets])


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_rows_have_the_values_and_gradients_of_the_plain_formula(chunk):
    torch.manual_seed(0)
    shapes = ((7, 5), (11, 5), (11,))
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    upstream = torch.randn(7, 3, dtype=torch.float64)

    def largest(logits, scale):
        return logits.log_softmax(-1).topk(3).values * scale[:, None]

    scale = torch.arange(1.0, 8.0, dtype=torch.float64)
    plain = largest(hidden @ weight.T + bias, scale)
    ours = rows_over_vocabulary(largest, [(hidden, Head(weight, 11, bias))], [scale], chunk=chunk)
    assert torch.equal(ours, plain) or torch.allclose(ours, plain, rtol=1e-13)
    wanted = torch.autograd.grad(plain, (hidden, weight, bias), upstream)
    for got, want in zip(torch.autograd.grad(ours, (hidden, weight, bias), upstream), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_rows_of_no_rows_and_of_a_detached_head():
    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(11, 5)
    assert rows_over_vocabulary(lambda z: z.topk(2).values, [(hidden[:0], Head(weight, 11))]).shape == (0, 2)
    rows_over_vocabulary(lambda z: z.topk(2).values, [(hidden, Head(weight, 11))]).sum().backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("elements", [1, 30, 2**21])
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_of_chosen_tokens_are_those_of_the_whole_head(elements, frozen, monkeypatch):
    monkeypatch.setitem(vocabulary._PIECE_ELEMENTS, "cpu", elements)
    (hidden, head), _, _ = _problem()
    leaves = [hidden] if frozen else [hidden, head.weight, head.bias]
    for leaf in leaves:
        leaf.requires_grad_()
    tokens = torch.randint(23, (11, 4), generator=torch.Generator().manual_seed(1))
    tokens[3] = tokens[2, 0]  # one token several times
    upstream = torch.randn(11, 4, dtype=torch.float64)
    ours, plain = logits_at(hidden, head, tokens), (hidden @ head.weight.T + head.bias).gather(1, tokens)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    wanted = torch.autograd.grad(plain, leaves, upstream)
    for got, want in zip(torch.autograd.grad(ours, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_logits_of_chosen_tokens_have_the_types_of_the_others():
    hidden = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    head, tokens = Head(torch.randn(11, 5, dtype=torch.bfloat16, requires_grad=True), 11), torch.tensor([[0, 10]] * 3)
    found = logits_at(hidden, head, tokens)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = logits_at(hidden.float(), Head(head.weight.float(), 11), tokens)
    torch.testing.assert_close(narrow, found)
    assert logits_at(hidden[:0], head, tokens[:0]).shape == (0, 2)
