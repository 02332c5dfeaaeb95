"""Dual-space distillation by cross-model attention: its formula written with loops, and its options."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.errors import UserError
from kdbench.losses.divergences import entropy, forward_kl, reverse_kl, skewed_reverse_kl
from kdbench.methods.base import Shape
from kdbench.methods.dskd_cma import DskdCma
from kdbench.signals import Step
from tests.methods import relations
from tests.methods.cases import random_signals

OPTIONS = [
    {},
    {"objective": "reverse_kl", "temperature": 1.5, "teacher_temperature": 2.0, "ce_rate": 0.2, "kd_rate": 0.7},
    {"objective": "skewed_reverse_kl", "deviation": "batch"},
    {"renormalise": True},
    {"causal": True},
    {"causal": True, "target_in_values": False, "squared_temperature": True},
]
OBJECTIVES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "skewed_reverse_kl": skewed_reverse_kl}


def _one(seed=10, **options):
    """A method in float64, signals of few tokens (so that guesses are right now and then), and their step."""
    student, teacher = random_signals("dskd_cma", sizes=(3, 4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        replace(
            of, rows=replace(of.rows, inputs=torch.randint(of.head.size, of.rows.inputs.shape, generator=generator))
        )
        for of in (student, teacher)
    )
    torch.manual_seed(seed)
    settings = DskdCma.Settings(**options)
    method = DskdCma(settings, Shape(5, 5, 3), Shape(6, 6, 4)).double()
    return method, student, teacher, relations.relate(DskdCma.needs(settings), student.rows, teacher.rows)


def _visible(reader, read):
    first = [j == 0 or read[j - 1] != read[j] for j in range(len(read))]
    return torch.tensor([[c < own or (c == own and first[j]) for j, c in enumerate(read)] for own in reader])


def _plain(method, student, teacher, step):
    """The formula of the class on whole matrices, a sequence at a time: sums by name, and diagnostics."""
    settings, found = method.settings, {}
    everything = _teacher_tensors(teacher, slice(None))
    for b in range(len(student.rows.counts)):
        ours, theirs = student.rows.sequence == b, teacher.rows.sequence == b
        index, target, hidden = _teacher_tensors(teacher, theirs)
        stds = [of.std() for of in (everything if settings.deviation == "batch" else (index, target, hidden))]
        embedded = [student.embed(ids[ours]) for ids in (student.rows.inputs, student.rows.targets)]
        scores = method.query(torch.cat(embedded, -1)) @ (index / stds[0]).T / (2 * 6) ** 0.5
        values = hidden / stds[2] + (target / stds[1] if settings.target_in_values else 0)
        scores_back = scores.T
        if settings.causal:
            reader, read = (of[chosen].tolist() for of, chosen in zip(step.chunks, (ours, theirs), strict=True))
            scores = scores.masked_fill(~_visible(reader, read), -torch.inf)
            scores_back = scores_back.masked_fill(~_visible(read, reader), -torch.inf)
        t2s = scores.softmax(-1) @ method.t2s(values) @ student.head.weight.detach().T
        s2t = scores_back.softmax(-1) @ method.s2t(student.rows.hidden[ours]) @ teacher.head.weight.T
        z_s, y = student.rows.hidden[ours] @ student.head.weight.T, student.rows.targets[ours]
        z_t = (teacher.rows.hidden[theirs] @ teacher.head.weight.T)[:, :4]
        scale = settings.temperature**2 if settings.squared_temperature else 1.0
        right = t2s.argmax(-1) == y
        kd = OBJECTIVES[settings.objective](
            z_s[:, :3], t2s[:, :3].detach() / settings.teacher_temperature, settings.temperature
        )
        per_row = len(y) / max(1, int(right.sum())) if settings.renormalise else 1.0
        for name, value in {
            "ce": F.cross_entropy(z_s, y, reduction="sum"),
            "t2s_ce": F.cross_entropy(t2s, y, reduction="sum"),
            "t2s_kd": scale * per_row * kd[right].sum(),
            "s2t_kd": scale * forward_kl(s2t[:, :4], z_t, settings.temperature).sum(),
            "t2s_correct": right.double().sum(),
            "s2t_correct": len(y)
            * (s2t[:, : teacher.head.size].argmax(-1) == teacher.rows.targets[theirs]).double().mean(),
            "max_t2s_prob": t2s.softmax(-1).amax(-1).sum(),
            "teacher_entropy": len(y) * entropy(z_t).mean(),
        }.items():
            found[name] = found.get(name, 0.0) + value
    return found


def _teacher_tensors(teacher, chosen):
    read, target = (teacher.embed(ids[chosen]) for ids in (teacher.rows.inputs, teacher.rows.targets))
    return torch.cat([read, target], -1), target, teacher.rows.hidden[chosen]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [10, 14])
def test_loss_diagnostics_and_gradients_are_those_of_the_formula(options, seed):
    method, student, teacher, step = _one(seed, **options)
    terms, plain = method(student, teacher, step), _plain(method, student, teacher, step)
    assert 0 < plain["t2s_correct"] < len(student.rows.targets)
    for name, value in (terms.sums | terms.diagnostics).items():
        torch.testing.assert_close(
            value, plain[name].detach(), rtol=1e-6 if name in terms.diagnostics else 1e-12, atol=0
        )
    assert set(terms.sums | terms.diagnostics) == set(plain)
    rates = {name: method.settings.ce_rate if name == "ce" else method.settings.kd_rate for name in terms.sums}
    total = sum(rate * plain[name] for name, rate in rates.items())
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight, *method.parameters()]
    gradients = [torch.autograd.grad(of, leaves) for of in (terms.total, total)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    """For what no term holds fixed: the student's states and s2t."""
    method, student, teacher, step = _one(**options)

    def total(hidden, weight):
        signals = replace(student, rows=replace(student.rows, hidden=hidden)), teacher, step
        return torch.func.functional_call(method, {"s2t.weight": weight}, signals).total

    assert torch.autograd.gradcheck(total, [student.rows.hidden, method.s2t.weight], fast_mode=True)


@pytest.mark.parametrize("options", [of for of in OPTIONS if of.get("deviation") != "batch"])
def test_sequences_alone_add_up_to_the_batch(options):
    method, student, teacher, step = _one(**options)
    whole = method(student, teacher, step)
    parts = [method(*_alone(student, teacher, step, number)) for number in range(2)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-12, atol=0)


def test_standard_deviations_of_the_batch_depend_on_it():
    method, student, teacher, step = _one(deviation="batch")
    parts = [method(*_alone(student, teacher, step, number)) for number in range(2)]
    assert not torch.isclose(sum(part.total for part in parts), method(student, teacher, step).total, rtol=1e-6)


def _alone(student, teacher, step, number):
    chosen = [of.rows.sequence == number for of in (student, teacher)]
    signals = []
    for of, rows in zip((student, teacher), chosen, strict=True):
        r = of.rows
        fields = r.hidden[rows], r.targets[rows], r.sequence[rows] * 0, r.counts[[number]], r.inputs[rows]
        signals.append(replace(of, rows=type(r)(*fields)))
    if step.chunks is None:
        return *signals, step
    chunks = [of[rows] for of, rows in zip(step.chunks, chosen, strict=True)]
    return *signals, replace(step, chunks=tuple(of - chunks[0][0] for of in chunks))


def test_causal_attention_without_targets_keeps_the_text_ahead_out_of_the_states_that_are_mixed():
    """What is written after a chunk has no influence on the projected teacher's rows before it."""
    method, student, teacher, step = _one(causal=True, target_in_values=False, deviation="batch")
    last = step.chunks[1] == step.chunks[1].max()
    teacher = replace(teacher, rows=replace(teacher.rows, hidden=teacher.rows.hidden.clone().requires_grad_()))
    given = method.deviations(*_teacher_tensors(teacher, slice(None)), teacher.rows.counts)
    method.deviations = lambda *_: [of.detach() for of in given]
    values = []
    method.t2s.register_forward_hook(
        lambda module, arguments, output: values.append(output.detach().requires_grad_()) or values[0]
    )
    projected, _ = method.mixtures(student, teacher, step)
    before = step.chunks[0] < step.chunks[0].max()
    (gradient,) = torch.autograd.grad(projected[before].sum(), values)
    assert not gradient[last].any()
    assert gradient[~last].any()


@pytest.mark.parametrize(("causal", "chunks"), [(False, False), (True, True)])
def test_chunks_are_asked_for_where_attention_is_causal(causal, chunks):
    assert DskdCma.needs(DskdCma.Settings(causal=causal)).chunks is chunks


def test_causal_attention_insists_on_chunks():
    method, student, teacher, _ = _one(causal=True)
    with pytest.raises(ValueError, match="chunks"):
        method(student, teacher, Step())


def test_embeddings_of_another_width_than_the_states():
    student, wide = Shape(5, 3, 3), Shape(6, 4, 4)
    with pytest.raises(UserError, match="6 and 4 wide: set `target_in_values: false`"):
        DskdCma(DskdCma.Settings(), student, wide)
    method = DskdCma(DskdCma.Settings(target_in_values=False), student, wide)
    assert tuple(method.query.weight.shape) == (8, 6)
    DskdCma(DskdCma.Settings(), student, Shape(6, 6, 4))


def test_the_student_s_embeddings_get_no_gradient():
    method, student, teacher, step = _one()
    table = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    terms = method(replace(student, embed=table.__getitem__), teacher, step)
    assert torch.autograd.grad(terms.total, [table], allow_unused=True) == (None,)


def test_one_tokenizer_for_both():
    """Rows of both sides, one to one: attention may differ, but everything is there."""
    method, student, _, _ = _one()
    method = DskdCma(DskdCma.Settings(), Shape(5, 5, 3), Shape(5, 5, 3)).double()
    terms = method(student, replace(student, rows=replace(student.rows, hidden=student.rows.hidden.detach())), Step())
    assert terms.total.isfinite()
    assert terms.diagnostics["teacher_entropy"] > 0
