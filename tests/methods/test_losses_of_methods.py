"""The loss of every method: its formula, and what must not change it."""

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import adaptive_kl, forward_kl, skewed_reverse_kl
from kdbench.methods.base import Shape
from kdbench.models import transformer
from kdbench.signals import Step
from tests.methods.cases import CASES, WITH_SIGNAL, Pair, across, build, pairs, random_signals

every = pytest.mark.parametrize("name", CASES)


def _ce(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")


def _plain(name, method, student, teacher, paired):
    """The formulas of docs/methods.md on whole matrices of logits, for autograd to differentiate."""
    z_s, y, size = student.rows.hidden @ student.head.weight.T, student.rows.targets, student.head.size
    ce = _ce(z_s, y)
    if name in ("sft", "seqkd"):
        return ce
    z_t = teacher.rows.hidden @ teacher.head.weight.T
    if name.startswith("vanilla_kd"):
        if name == "vanilla_kd":
            return 0.5 * ce + 0.5 * forward_kl(z_s[:, :size], z_t[:, :size], 2.0).sum()
        return 0.2 * ce + 0.5 * adaptive_kl(z_s[:, :size], z_t[:, :size]).sum()
    if name.startswith("dskd"):
        kd_rate, objective = {"dskd": (0.5, forward_kl), "dskd_skewed": (1.5, skewed_reverse_kl)}[name]
        t2s = method.t2s(teacher.rows.hidden) @ student.head.weight.detach().T
        s2t = method.s2t(student.rows.hidden) @ teacher.head.weight.T
        kd = _ce(t2s, y) + objective(z_s[:, :size], t2s.detach()[:, :size], 2.0).sum()
        return 0.5 * ce + kd_rate * (kd + forward_kl(s2t[:, :size], z_t[:, :size], 2.0).sum())
    total = ce
    for i, j in paired.tolist():
        q = z_s[i, :size].softmax(0).sort(descending=True).values
        p = z_t[j, : teacher.head.size].softmax(0).sort(descending=True).values
        total = total + {"uld": 1.0, "uld_byte": 1.5}[name] * (F.pad(q, (0, len(p) - len(q))) - p).abs().sum()
    return total


@every
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks(name, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", elements)
    student, teacher = random_signals(name)
    method = build(name, Shape(5, 5, 23), Shape(6, 6, teacher.head.size))
    paired = pairs(name, student.rows, teacher.rows)
    terms = method(student, teacher, Step(pairs=paired))
    plain = _plain(name, method, student, teacher, paired)
    torch.testing.assert_close(terms.total, plain, rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight, *method.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(terms.total, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@every
def test_total_is_the_weighted_sum_of_the_terms(name):
    student, teacher = random_signals(name)
    method = build(name, Shape(5, 5, 23), Shape(6, 6, teacher.head.size))
    terms = method(student, teacher, Step(pairs=pairs(name, student.rows, teacher.rows)))
    rates = CASES[name][1]
    ce_rate = rates.get("ce_rate", getattr(method.settings, "ce_rate", 1.0))
    kd_rate = rates.get("kd_rate", getattr(method.settings, "kd_rate", 1.0))
    expected = sum((ce_rate if term == "ce" else kd_rate) * value for term, value in terms.sums.items())
    torch.testing.assert_close(terms.total.detach(), expected)
    assert all(not value.requires_grad for value in [*terms.sums.values(), *terms.diagnostics.values()])


@every
def test_padding_does_not_change_the_loss(name):
    pair = Pair(name)
    rows = [0, 2, 4]
    terms = pair.terms(rows)
    padded = pair.terms(rows, extra_padding=9, padding_id=7)
    torch.testing.assert_close(padded.total, terms.total, rtol=1e-12, atol=0)
    for one, other in zip(pair.gradients(padded), pair.gradients(terms), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every
def test_states_of_prompts_and_padding_do_not_reach_the_loss(name):
    pair = Pair(name)
    rows = [0, 1, 2, 3]
    before = pair.terms(rows).total

    def disturb(model, side):
        def hook(module, arguments, output):
            keep = torch.zeros(side.input_ids.numel(), dtype=torch.bool)
            keep[side.positions] = True
            noise = 100 * torch.randn_like(output.last_hidden_state)
            kept = keep.view(*side.input_ids.shape, 1)
            output.last_hidden_state = torch.where(kept, output.last_hidden_state, noise)
            return output

        return transformer(model).register_forward_hook(hook)

    handles = [disturb(model, side) for model, side in zip((pair.student, pair.teacher), pair.sides(rows), strict=True)]
    after = pair.terms(rows).total
    for handle in handles:
        handle.remove()
    assert before == after


@every
def test_micro_batches_add_up_to_the_batch(name):
    pair = Pair(name)
    whole = pair.terms([3, 0, 4, 1, 2])
    parts = [pair.terms([3, 0]), pair.terms([4]), pair.terms([1, 2])]
    for term, value in (whole.sums | whole.diagnostics).items():
        summed = sum((part.sums | part.diagnostics)[term] for part in parts)
        torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-12)
    expected = pair.gradients(whole)
    found = [pair.gradients(part) for part in parts]
    for index, gradient in enumerate(expected):
        if gradient is None:
            assert all(part[index] is None for part in found)
        else:
            torch.testing.assert_close(sum(part[index] for part in found), gradient, rtol=1e-10, atol=1e-9)


@every
def test_in_bfloat16_the_loss_is_about_the_same_and_gradients_are_float32(name):
    pair, rows = Pair(name, dtype=torch.float32), [0, 1, 2]
    wide = pair.terms(rows)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = pair.terms(rows)
    assert narrow.total.dtype == torch.float32
    assert narrow.total != wide.total
    torch.testing.assert_close(narrow.total, wide.total, rtol=2e-2, atol=0)
    one, other = (torch.cat([g.flatten() for g in pair.gradients(terms) if g is not None]) for terms in (narrow, wide))
    assert one.dtype == torch.float32
    # |q - p| has a kink: where rounding turns its sign, the gradient of that rank jumps. With the states of this batch held fixed, 3 of
    # uld_byte's 432 ranks turned, all with |q - p| < 0.002, and their signs account for the loss's share of the difference.
    assert torch.cosine_similarity(one, other, dim=0) > (0.98 if across(name) else 0.999)


@every
def test_everything_that_is_learned_gets_a_gradient(name):
    """And the teacher none."""
    pair = Pair(name)
    pair.teacher.requires_grad_(True)
    pair.terms([0, 1]).total.backward()
    for of, module in {"student": pair.student, "method": pair.method}.items():
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None, (of, parameter_name)
    reached = {parameter_name for parameter_name, p in pair.teacher.named_parameters() if p.grad is not None}
    assert reached == set()


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_a_method_that_asks_for_a_signal_insists_on_it(name):
    student, _ = random_signals(name)
    method = build(name, Shape(5, 5, 23), Shape(6, 6, 23))
    with pytest.raises(ValueError, match="asks for a teacher's signal"):
        method(student, None, Step())


def test_uld_insists_on_pairs():
    student, teacher = random_signals("uld")
    with pytest.raises(ValueError, match="pairs"):
        build("uld", Shape(5, 5, 23), Shape(6, 6, 31))(student, teacher, Step())


def test_uld_without_a_single_pair_is_fine_tuning():
    student, teacher = random_signals("uld")
    terms = build("uld", Shape(5, 5, 23), Shape(6, 6, 31))(
        student, teacher, Step(pairs=torch.zeros(0, 2, dtype=torch.long))
    )
    assert terms.sums["uld"].item() == 0
    torch.testing.assert_close(terms.total.detach(), terms.sums["ce"])
