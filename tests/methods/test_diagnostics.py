"""What methods log besides their losses: sums that, divided by the student's response tokens, are the wanted means."""

import math
from dataclasses import replace

import pytest
import torch

from kdbench.losses.divergences import entropy
from kdbench.signals import Step
from tests.methods.cases import one_step


def _entropy(signal):
    p = (signal.rows.hidden @ signal.head.weight.T)[:, : signal.head.size].softmax(-1)
    return -(p * p.log()).sum(-1)


def test_entropy():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(-1).detach(), rtol=1e-12, atol=0)
    assert not entropy(logits).requires_grad
    ends = torch.tensor([[0.0, -torch.inf, -1e4], [0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    torch.testing.assert_close(entropy(ends), torch.tensor([0.0, math.log(3), math.nan]), equal_nan=True)


@pytest.mark.parametrize("name", ["vanilla_kd", "dskd"])
def test_teacher_entropy_is_the_sum_over_its_rows(name):
    """At temperature 1, whatever that of the method."""
    method, student, teacher, step = one_step(name)
    assert method.settings.temperature == 2.0
    found = method(student, teacher, step).diagnostics["teacher_entropy"]
    torch.testing.assert_close(found, _entropy(teacher).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["uld", "uld_byte"])
def test_of_uld_they_are_of_the_rows_that_are_paired(name):
    """Teacher's entropy: for each sequence the mean over its paired rows, times the student's rows."""
    method, student, teacher, step = one_step(name)
    terms = method(student, teacher, step)
    assert terms.diagnostics["aligned"] == len(step.pairs) < len(student.rows.targets)
    values, expected = _entropy(teacher), 0.0
    for sequence, count in enumerate(student.rows.counts.tolist()):
        theirs = [j for i, j in step.pairs.tolist() if student.rows.sequence[i] == sequence]
        expected += count * values[theirs].mean().item()
    assert terms.diagnostics["teacher_entropy"].item() == pytest.approx(expected, rel=1e-6)


def test_of_uld_without_pairs_they_are_zero():
    method, student, teacher, _ = one_step("uld")
    terms = method(student, teacher, Step(pairs=torch.zeros(0, 2, dtype=torch.long)))
    assert terms.diagnostics["aligned"] == terms.diagnostics["teacher_entropy"] == 0


@pytest.mark.parametrize("name", ["vanilla_kd", "dskd", "uld"])
def test_they_change_neither_loss_nor_gradient_nor_the_rows_of_logits(name, monkeypatch):
    """Against the same method with an entropy that is not computed."""
    from kdbench.losses import vocabulary

    made = []
    rows = vocabulary._Projection.rows
    monkeypatch.setattr(vocabulary._Projection, "rows", lambda head, part: made.append(part) or rows(head, part))
    found = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(f"kdbench.methods.{name}.entropy", lambda z: z.new_zeros(len(z)))
        method, student, teacher, step = one_step(name)
        made.clear()
        terms = method(student, teacher, step)
        leaves = [student.rows.hidden, student.head.weight, *method.parameters()]
        found.append((terms.total.detach(), *torch.autograd.grad(terms.total, leaves), torch.tensor(len(made))))
        assert (terms.diagnostics["teacher_entropy"] == 0) == without
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_teacher_that_is_no_number_stays_visible():
    method, student, teacher, step = one_step("vanilla_kd")
    hidden = teacher.rows.hidden.index_fill(0, torch.tensor([2]), torch.nan)
    terms = method(student, replace(teacher, rows=replace(teacher.rows, hidden=hidden)), step)
    assert terms.total.isnan()
    assert terms.diagnostics["teacher_entropy"].isnan()
