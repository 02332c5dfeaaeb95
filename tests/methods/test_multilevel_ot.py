"""multilevel_ot: its formula row by row, its options, and what must not change it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.methods.base import Shape
from kdbench.methods.multilevel_ot import MultilevelOt
from kdbench.signals import Head, Signal, Step
from tests.methods.cases import random_signals

INDEX = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]])
BYTE = torch.tensor([[1, 0], [3, 3], [4, 5], [8, 6]])


def _run(student, teacher, pairs=INDEX, **settings):
    shapes = Shape(5, 5, student.head.size), Shape(6, 6, teacher.head.size)
    return MultilevelOt(MultilevelOt.Settings(**settings), *shapes)(student, teacher, Step(pairs=pairs))


def _signals(seed=0):
    """Sequences of 4 and 5 rows, the teacher's of 4 and 3; vocabularies of 23 and 31, heads of 3 rows more."""
    return random_signals("multilevel_ot", seed=seed)


def _probabilities(logits, counts, size, k, temperature):
    """Of the k tokens of the largest summed logits, sequence by sequence: a list of (n_b, k)."""
    found = []
    for z in logits[:, :size].split(counts.tolist()):
        tokens = z.sum(0).argsort(descending=True)[:k]
        found.append((z / temperature).softmax(-1)[:, tokens])
    return found


def _sinkhorn_distance(s, t, epsilon, iterations, plan_constant=False):
    """⟨P, C⟩ by scaling the kernel, rows before columns."""
    cost = (s[:, None] - t[None]).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / len(s)
        plan = plan / plan.sum(0, keepdim=True) / len(t)
    return ((plan.detach() if plan_constant else plan) * cost).sum()


def _plain(student, teacher, pairs, settings):
    """CE, L_HAD, L_SL and L_SD with loops over rows and sequences."""
    z_s, z_t = student.rows.hidden @ student.head.weight.T, teacher.rows.hidden @ teacher.head.weight.T
    ce = F.cross_entropy(z_s, student.rows.targets, reduction="sum")
    if settings.normalize_logits:
        z_s, z_t = (
            torch.cat([z[:, : of.head.size] / (z[:, : of.head.size].std(-1, keepdim=True) + 1e-4), z[:, of.head.size :]], 1)
            for z, of in ((z_s, student), (z_t, teacher))
        )  # fmt: skip
    k = min(settings.top_k, student.head.size, teacher.head.size)
    s, t = (
        torch.cat(_probabilities(z, of.rows.counts, of.head.size, k, settings.token_temperature))
        for z, of in ((z_s, student), (z_t, teacher))
    )
    had = sum((s[i] - t[j]).abs().sum() for i, j in pairs.tolist())
    sl = sum(-(t[j] * s[i].log()).sum() for i, j in pairs.tolist())
    both = (
        _probabilities(z, of.rows.counts, of.head.size, k, settings.sequence_temperature)
        for z, of in ((z_s, student), (z_t, teacher))
    )
    sd = sum(
        len(of_s)
        * _sinkhorn_distance(of_s, of_t, settings.sinkhorn_lambda, settings.sinkhorn_iterations, not settings.unrolled)
        for of_s, of_t in zip(*both, strict=True)
    )
    return {"ce": ce, "had": had, "sl": sl, "sd": sd}


@pytest.mark.parametrize("elements", [1, 60, 2**24])
@pytest.mark.parametrize(
    ("pairs", "settings"),
    [
        (INDEX, {}),
        (INDEX, {"top_k": 7}),
        (INDEX, {"top_k": 1, "unrolled": False}),
        (BYTE, {"alignment": "byte", "top_k": 12, "token_temperature": 1.5, "sequence_temperature": 0.7}),
        (BYTE, {"ce_rate": 0.4, "kd_rate": 2.0, "sl_weight": 0.6, "sd_weight": 1.7, "sinkhorn_iterations": 3}),
    ],
)
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks(pairs, settings, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    student, teacher = _signals()
    found = MultilevelOt.Settings(**settings)
    terms = _run(student, teacher, pairs, **settings)
    plain = _plain(student, teacher, pairs, found)
    shares = {"ce": found.ce_rate, "had": found.kd_rate}
    shares |= {"sl": found.kd_rate * found.sl_weight, "sd": found.kd_rate * found.sd_weight}
    total = sum(shares[name] * value for name, value in plain.items())
    assert terms.sums.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(terms.sums[name], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight]
    found, wanted = torch.autograd.grad(terms.total, leaves), torch.autograd.grad(total, leaves)
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_published_constants():
    settings = MultilevelOt.Settings()
    assert (settings.ce_rate, settings.kd_rate, settings.sl_weight, settings.sd_weight) == (1.0, 0.15, 0.1, 0.1)
    assert (settings.top_k, settings.sinkhorn_lambda, settings.sinkhorn_iterations) == (50, 0.1, 20)
    assert (settings.token_temperature, settings.sequence_temperature) == (1.0, 2.0)


def test_normalized_logits_are_ranked_as_they_were():
    """Dividing a row by its deviation does not reach the ranking, only the probabilities."""
    student, teacher = _signals()
    terms = _run(student, teacher, normalize_logits=True, top_k=50)
    z_s, z_t = ((of.rows.hidden @ of.head.weight.T)[:, : of.head.size] for of in (student, teacher))
    expected = 0.0
    starts = 0, 0
    for n, m in ((4, 4), (5, 3)):
        ours, theirs = z_s[starts[0] : starts[0] + n], z_t[starts[1] : starts[1] + m]
        s, t = (
            (z / (z.std(-1, keepdim=True) + 1e-4)).softmax(-1)[:, z.sum(0).argsort(descending=True)[:23]]
            for z in (ours, theirs)
        )
        paired = min(n, m)
        expected = expected + (s[:paired] - t[:paired]).abs().sum().detach()
        starts = starts[0] + n, starts[1] + m
    torch.testing.assert_close(terms.sums["had"], expected, rtol=1e-12, atol=0)


def test_the_plan_held_fixed_changes_the_gradient_alone():
    student, teacher = _signals()
    through, fixed = (
        _run(student, teacher, unrolled=unrolled, kd_rate=50.0, sd_weight=1.0) for unrolled in (True, False)
    )
    torch.testing.assert_close(through.total, fixed.total, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(terms.total, student.rows.hidden)[0] for terms in (through, fixed)]
    assert not torch.allclose(*gradients)


def test_other_sequences_of_the_batch_have_no_say():
    """Neither in the ranking nor in the plan."""
    student, teacher = _signals()
    other, other_teacher = _signals(seed=1)
    before = _run(student, teacher)

    def second_replaced(signal, of):
        hidden = torch.cat([signal.rows.hidden[:4], 9 * of.rows.hidden[4:]])
        return replace(signal, rows=replace(signal.rows, hidden=hidden))

    after = _run(second_replaced(student, other), second_replaced(teacher, other_teacher))
    leaves = [student.rows.hidden]
    changed, same = (torch.autograd.grad(of.total, leaves)[0] for of in (after, before))
    torch.testing.assert_close(changed[:4], same[:4], rtol=1e-12, atol=1e-14)
    assert after.sums["had"] != before.sums["had"]


def test_the_order_of_a_vocabulary_does_not_matter():
    student, teacher = _signals()
    before = _run(student, teacher)
    generator = torch.Generator().manual_seed(3)

    def shuffled(signal):
        order = torch.randperm(signal.head.size, generator=generator)
        weight = torch.cat([signal.head.weight[order], signal.head.weight[len(order) :]])
        rows = replace(signal.rows, targets=order.argsort()[signal.rows.targets])
        return Signal(rows, Head(weight, signal.head.size), None)

    after = _run(shuffled(student), shuffled(teacher))
    torch.testing.assert_close(after.total, before.total, rtol=1e-12, atol=0)


def test_a_bias_of_the_head_counts_in_the_ranking():
    """A token that a bias lifts above all others is the first; without one it is of no account."""
    student, teacher = _signals()
    bias = torch.zeros(student.head.weight.shape[0], dtype=torch.float64)
    bias[7] = 30.0
    lifted = replace(student, head=Head(student.head.weight, student.head.size, bias))
    terms = _run(lifted, teacher, top_k=1)
    z_t = (teacher.rows.hidden @ teacher.head.weight.T)[:, : teacher.head.size]
    t = torch.cat(_probabilities(z_t, teacher.rows.counts, teacher.head.size, 1, 1.0))
    torch.testing.assert_close(terms.sums["had"], (1 - t).sum(), rtol=1e-6, atol=0)


def test_a_student_equal_to_its_teacher():
    """No difference, and a logarithmic loss that is the entropy of what is kept."""
    _, teacher = _signals()
    rows = torch.arange(7)
    terms = _run(teacher, teacher, torch.stack([rows, rows], 1), top_k=31)
    z = (teacher.rows.hidden @ teacher.head.weight.T)[:, :31]
    assert terms.sums["had"].item() == pytest.approx(0, abs=1e-12)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum()
    torch.testing.assert_close(terms.sums["sl"], entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.diagnostics["teacher_mass"], torch.tensor(7.0, dtype=torch.float64))
    assert terms.sums["sd"] < _run(*_signals()).sums["sd"]


def test_rows_of_a_head_beyond_the_tokenizer_reach_the_cross_entropy_alone():
    student, teacher = _signals()
    before = _run(student, teacher)
    with torch.no_grad():
        student.head.weight[student.head.size :] += 1.0
        teacher.head.weight[teacher.head.size :] += 1.0
    after = _run(student, teacher)
    assert after.sums["ce"] != before.sums["ce"]
    for name in ("had", "sl", "sd"):
        torch.testing.assert_close(after.sums[name], before.sums[name], rtol=1e-12, atol=0)


def test_diagnostics_are_means_over_the_teacher_scaled_to_the_students_rows():
    student, teacher = _signals()
    found = _run(student, teacher, BYTE, alignment="byte", top_k=6).diagnostics
    z = (teacher.rows.hidden @ teacher.head.weight.T)[:, : teacher.head.size]
    entropies = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    kept = torch.cat(_probabilities(z, teacher.rows.counts, teacher.head.size, 6, 1.0)).sum(-1)
    assert found.keys() == {"aligned", "teacher_entropy", "teacher_mass", "marginal_error"}
    assert found["aligned"].item() == 4
    torch.testing.assert_close(found["teacher_entropy"], 4 * entropies[:4].mean() + 5 * entropies[4:].mean())
    torch.testing.assert_close(found["teacher_mass"], 4 * kept[:4].mean() + 5 * kept[4:].mean())
    errors = [_run(student, teacher, sinkhorn_iterations=n).diagnostics["marginal_error"] for n in (1, 5, 300)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_not_finite_is_not_hidden(side):
    student, teacher = _signals()
    with torch.no_grad():
        (student if side == "student" else teacher).rows.hidden[8 if side == "student" else 6] = torch.nan
    assert _run(student, teacher).total.isnan()


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"top_k": 0}, {"sinkhorn_lambda": 0.0}, {"sinkhorn_iterations": 0}, {"alignment": "dtw"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MultilevelOt.Settings(**settings)


def test_needs():
    for alignment in ("index", "byte"):
        needs = MultilevelOt.needs(MultilevelOt.Settings(alignment=alignment))
        assert (needs.teacher, needs.alignment, needs.vocabulary) == ("signal", alignment, False)
