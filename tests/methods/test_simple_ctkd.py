"""Distillation on shared tokens: its formula, and what it is for one tokenizer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import entropy, forward_kl, reverse_kl
from kdbench.methods.base import Shape
from kdbench.methods.simple_ctkd import SimpleCtkd
from kdbench.methods.vanilla_kd import VanillaKd
from kdbench.signals import Head, Step
from tests.methods import relations
from tests.methods.cases import random_signals

OPTIONS = [{}, {"objective": "reverse_kl", "temperature": 3.0, "ce_rate": 0.1, "kd_rate": 2.0}]


def _one(bias=False, **options):
    student, teacher = random_signals("simple_ctkd")
    if bias:
        student, teacher = (
            replace(
                of,
                head=Head(
                    of.head.weight, of.head.size, torch.linspace(-3, 3, len(of.head.weight), dtype=torch.float64)
                ),
            )
            for of in (student, teacher)
        )
        student.head.bias.requires_grad_()
    settings = SimpleCtkd.Settings(**options)
    vocabulary = relations.vocabulary(student.head.size, teacher.head.size)
    method = SimpleCtkd(settings, Shape(5, 5, 23), Shape(6, 6, 31), vocabulary)
    method.initialize(student.head.detach(), teacher.head)
    return (
        method,
        student,
        teacher,
        relations.relate(SimpleCtkd.needs(settings), student.rows, teacher.rows),
        vocabulary,
    )


def _logits(signal):
    logits = signal.rows.hidden @ signal.head.weight.T
    return logits if signal.head.bias is None else logits + signal.head.bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_diagnostics_and_gradients_are_those_of_the_formula(options, bias, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    method, student, teacher, step, vocabulary = _one(bias, **options)
    terms = method(student, teacher, step)
    divergence = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[method.settings.objective]
    z_s, z_t = _logits(student), _logits(teacher)
    kd = 0.0
    for i, j in step.pairs.tolist():
        over = z_s[i, vocabulary.shared[:, 0]], z_t[j, vocabulary.shared[:, 1]]
        kd = kd + divergence(*over, method.settings.temperature)
    ce = F.cross_entropy(z_s, student.rows.targets, reduction="sum")
    torch.testing.assert_close(terms.sums, {"ce": ce.detach(), "kd": kd.detach()}, rtol=1e-12, atol=0)
    total = method.settings.ce_rate * ce + method.settings.kd_rate * kd
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight, *([student.head.bias] if bias else [])]
    gradients = [torch.autograd.grad(of, leaves) for of in (terms.total, total)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert terms.diagnostics["aligned"] == len(step.pairs) < len(student.rows.targets)
    expected = 0.0
    for sequence, count in enumerate(student.rows.counts.tolist()):
        theirs = [j for i, j in step.pairs.tolist() if student.rows.sequence[i] == sequence]
        expected += count * entropy(z_t[theirs][:, vocabulary.shared[:, 1]]).mean().item()
    assert terms.diagnostics["teacher_entropy"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    method, student, teacher, step, _ = _one(**options)

    def total(hidden, weight):
        signal = replace(student, rows=replace(student.rows, hidden=hidden), head=Head(weight, 23))
        return method(signal, teacher, step).total

    assert torch.autograd.gradcheck(total, [student.rows.hidden, student.head.weight])


def test_tokens_of_one_vocabulary_alone_play_no_part():
    method, student, teacher, step, vocabulary = _one(ce_rate=0.0)
    before = method(student, teacher, step).total
    changed = []
    for of, shared in zip((student, teacher), vocabulary.shared.unbind(1), strict=True):
        others = torch.ones(len(of.head.weight), dtype=torch.bool).index_fill(0, shared, False)
        weight = of.head.weight.detach().clone()
        weight[others] += 1.0
        changed.append(replace(of, head=Head(weight, of.head.size)))
    torch.testing.assert_close(method(*changed, step).total, before)


def test_for_one_tokenizer_it_is_vanilla_kd():
    student, teacher = random_signals("vanilla_kd")
    shared = torch.arange(23)[:, None].expand(-1, 2)
    vocabulary = replace(relations.vocabulary(23, 23), shared=shared)
    shapes = Shape(5, 5, 23), Shape(6, 6, 23)
    options = {"temperature": 2.0, "objective": "js_divergence"}
    method = SimpleCtkd(SimpleCtkd.Settings(**options), *shapes, vocabulary)
    method.initialize(student.head.detach(), teacher.head)
    rows = torch.arange(len(student.rows.targets))[:, None].expand(-1, 2)
    ours = method(student, teacher, Step(pairs=rows))
    vanilla = VanillaKd(VanillaKd.Settings(**options), *shapes)(student, teacher, Step())
    torch.testing.assert_close(ours.total, vanilla.total, rtol=1e-12, atol=0)
    assert ours.sums.keys() == vanilla.sums.keys()


def test_without_a_pair_it_is_fine_tuning():
    method, student, teacher, _, _ = _one()
    terms = method(student, teacher, Step(pairs=torch.zeros(0, 2, dtype=torch.long)))
    assert terms.sums["kd"] == terms.diagnostics["aligned"] == 0
    torch.testing.assert_close(terms.total.detach(), 0.5 * terms.sums["ce"])


def test_it_insists_on_the_vocabularies():
    with pytest.raises(ValueError, match="vocabularies"):
        SimpleCtkd(SimpleCtkd.Settings(), Shape(5, 5, 23), Shape(6, 6, 31))
