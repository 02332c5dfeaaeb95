"""Dual-space distillation at tokens of the same bytes: its formula, its projectors, its options."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import entropy, forward_kl, js_divergence
from kdbench.methods.base import Shape
from kdbench.methods.dskd_eta import DskdEta
from kdbench.signals import Head, Step
from tests.methods import relations
from tests.methods.cases import random_signals

OPTIONS = [
    {},
    {"objective": "js_divergence", "temperature": 1.0, "ce_rate": 0.2, "kd_rate": 0.7},
    {"renormalise": True},
    {"renormalise": True, "agreement": 0.3},
    {"agreement": 0.3, "student_space": 0.4, "teacher_space": 1.5},
]
OBJECTIVES = {"forward_kl": forward_kl, "js_divergence": js_divergence}
TERMS = ["t2s_ce", "t2s_kd", "s2t_kd"]


def _one(seed=12, one_tokenizer=False, **options):
    """A method in float64 after `initialize`, signals, a step that pairs most rows, and the vocabularies' relation.

    The heads resemble each other, so that the projected teacher often agrees with the teacher.
    """
    n, sizes = ((9, 9), (12, 12)) if one_tokenizer else ((9, 7), (12, 14))
    student, teacher = random_signals("dskd_eta", n=n, sizes=sizes, seed=seed)
    if one_tokenizer:
        teacher = replace(teacher, rows=replace(student.rows, hidden=teacher.rows.hidden))
        shared = torch.arange(sizes[0])[:, None].expand(-1, 2)
        vocabulary = replace(relations.vocabulary(*sizes), shared=shared)
        pairs = torch.arange(n[0])[:, None].expand(-1, 2)
    else:
        vocabulary = relations.vocabulary(*sizes)
        pairs = torch.tensor([[0, 0], [2, 1], [3, 3], [4, 4], [5, 5], [8, 6]])
    torch.manual_seed(seed)
    with torch.no_grad():
        ours, theirs = vocabulary.shared.unbind(1)
        teacher.head.weight[theirs] = (
            0.3 * teacher.head.weight[theirs] + student.head.weight[ours] @ torch.randn(5, 6).double()
        )
    method = DskdEta(DskdEta.Settings(**options), Shape(5, 5, sizes[0]), Shape(6, 6, sizes[1]), vocabulary).double()
    method.initialize(student.head.detach(), teacher.head)
    return method, student, teacher, Step(pairs=pairs), vocabulary


def _plain(method, student, teacher, step, vocabulary, only_agreeing=True):
    """The formula of the class, pair by pair: sums by name, and diagnostics."""
    settings, rows = method.settings, student.rows
    counterpart = {theirs: ours for ours, theirs in vocabulary.shared.tolist()}
    heads = student.head.weight.detach(), teacher.head.weight
    sizes = student.head.size, teacher.head.size
    s2t = heads[0][vocabulary.shared[:, 0]].T @ torch.linalg.pinv(heads[1][vocabulary.shared[:, 1]]).T
    z_s, z_t = rows.hidden @ student.head.weight.T, teacher.rows.hidden @ heads[1].T
    found = {
        "ce": F.cross_entropy(z_s, rows.targets, reduction="sum"),
        "aligned": len(step.pairs),
        "teacher_entropy": 0.0,
    }
    found |= dict.fromkeys([*TERMS, "labelled", "t2s_agreed", "t2s_correct"], 0.0)
    for b, count in enumerate(rows.counts.tolist()):
        terms, pairs = (
            {name: [] for name in TERMS},
            [pair for pair in step.pairs.tolist() if rows.sequence[pair[0]] == b],
        )
        for i, j in pairs:
            found["teacher_entropy"] += count / len(pairs) * entropy(z_t[j : j + 1, : sizes[1]]).item()
            label = counterpart.get(z_t[j, : sizes[1]].argmax().item())
            if label is None:
                continue
            t2s = method.t2s(teacher.rows.hidden[j]) @ heads[0].T
            agrees = t2s.argmax().item() == label
            found["labelled"] += 1
            found["t2s_agreed"] += agrees
            found["t2s_correct"] += float(t2s.argmax() == rows.targets[i])
            divergence, back = OBJECTIVES[settings.objective], rows.hidden[i] @ s2t @ heads[1].T
            terms["t2s_ce"].append(F.cross_entropy(t2s, torch.tensor(label)))
            if agrees or not only_agreeing:
                terms["t2s_kd"].append(divergence(z_s[i, : sizes[0]], t2s[: sizes[0]].detach(), settings.temperature))
            terms["s2t_kd"].append(divergence(back[: sizes[1]], z_t[j, : sizes[1]], settings.temperature))
        for name, values in terms.items():
            scale = count / max(1, len(values)) if settings.renormalise else 1.0
            found[name] = found[name] + scale * sum(values)
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_diagnostics_and_gradients_are_those_of_the_formula(options, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    method, student, teacher, step, vocabulary = _one(**options)
    for above in (False, True):
        method.restore({"agreement": 0.31 if above else 0.3})
        terms = method(student, teacher, step)
        plain = _plain(method, student, teacher, step, vocabulary, not (above and "agreement" in options))
        assert 0 < plain["t2s_agreed"] < plain["labelled"] < len(step.pairs)
        for name, value in (terms.sums | terms.diagnostics).items():
            assert value.item() == pytest.approx(
                float(torch.as_tensor(plain[name]).detach()), rel=1e-10 if name in terms.sums else 1e-6
            ), name
        assert set(terms.sums | terms.diagnostics) == set(plain)
        s = method.settings
        space = {"t2s_ce": s.student_space, "t2s_kd": s.student_space, "s2t_kd": s.teacher_space}
        total = s.ce_rate * plain["ce"] + s.kd_rate * sum(rate * plain[name] for name, rate in space.items())
        leaves = [student.rows.hidden, student.head.weight, method.t2s.weight]
        gradients = [torch.autograd.grad(of, leaves) for of in (terms.total, total)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    method, student, teacher, step, _ = _one(**options)

    def total(hidden):
        return method(replace(student, rows=replace(student.rows, hidden=hidden)), teacher, step).total

    assert torch.autograd.gradcheck(total, [student.rows.hidden], fast_mode=True)


def test_gradcheck_of_t2s():
    """Its cross entropy trains it alone; the divergence holds it fixed."""
    method, student, teacher, step, _ = _one(ce_rate=0.0)

    def cross_entropy(weight):
        signals = student, teacher, step
        terms = torch.func.functional_call(method, {"t2s.weight": weight}, signals)
        return terms.total - method.settings.kd_rate * (terms.sums["t2s_kd"] + terms.sums["s2t_kd"])

    assert torch.autograd.gradcheck(cross_entropy, [method.t2s.weight])


def test_initial_logits_are_the_best_that_the_student_s_head_can_do():
    """On the shared vocabulary: least squares for any state of the teacher, one by one."""
    method, student, teacher, _, vocabulary = _one()
    ours, theirs = vocabulary.shared.unbind(1)
    wanted = (teacher.rows.hidden @ teacher.head.weight.T)[:, theirs]
    found = (method.t2s(teacher.rows.hidden) @ student.head.weight.T)[:, ours]
    weight = student.head.weight.detach()[ours]
    best = weight @ torch.linalg.lstsq(weight, wanted.T).solution
    torch.testing.assert_close(found, best.T, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, wanted, rtol=0.1)


def test_initialisation_is_an_option():
    random, started = _one(initial_t2s=False)[0], _one()[0]
    assert not torch.allclose(random.t2s.weight, started.t2s.weight)
    torch.testing.assert_close(random.teacher_factor, started.teacher_factor, rtol=0, atol=0)


def test_s2t_follows_the_student_s_head_from_step_to_step():
    method, student, teacher, step, vocabulary = _one()
    before = method(student, teacher, step).sums["s2t_kd"]
    method.observe({"labelled": 0.0, "t2s_agreed": 0.0}, 1, 1)
    moved = replace(student, head=Head(student.head.weight.detach() * 1.5, student.head.size))
    plain = _plain(method, moved, teacher, step, vocabulary)
    found = method(moved, teacher, step).sums
    assert found["s2t_kd"].item() == pytest.approx(plain["s2t_kd"].item(), rel=1e-10)
    assert found["s2t_kd"] != before


def test_of_one_model_with_itself_nothing_is_left_to_learn():
    """With one tokenizer all tokens are shared; both maps are the identity, all rows agree, and both divergences are 0."""
    _, student, _, step, vocabulary = _one(one_tokenizer=True)
    method = DskdEta(DskdEta.Settings(), Shape(5, 5, 12), Shape(5, 5, 12), vocabulary).double()
    twin = replace(student, rows=replace(student.rows, hidden=student.rows.hidden.detach()), head=student.head.detach())
    method.initialize(twin.head, twin.head)
    torch.testing.assert_close(method.t2s.weight.detach(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    terms = method(student, twin, step)
    # A padding row of the head may be on top of the projected logits; the teacher's choice is a token.
    real = (student.rows.hidden @ student.head.weight.T).argmax(-1) < 12
    assert terms.diagnostics["labelled"] == terms.diagnostics["aligned"] == 9
    assert terms.diagnostics["t2s_agreed"] == real.sum() > 4
    assert terms.sums["t2s_kd"].abs() < 1e-12
    assert terms.sums["s2t_kd"].abs() < 1e-12


def test_for_one_tokenizer_it_is_the_formula_too():
    found = _one(one_tokenizer=True)
    plain, terms = _plain(*found), found[0](*found[1:4])
    for name, value in terms.sums.items():
        assert value.item() == pytest.approx(plain[name].item(), rel=1e-10)


def test_agreement_is_that_of_the_last_step():
    method, student, teacher, step, _ = _one(agreement=0.5)
    few = method(student, teacher, step).sums["t2s_kd"]
    assert method.state() == {"agreement": 0.0}
    assert method.observe({"labelled": 8.0, "t2s_agreed": 4.0}, 10, 1) == {"t2s_agreement": 0.5}
    assert method(student, teacher, step).sums["t2s_kd"] == few
    method.observe({"labelled": 8.0, "t2s_agreed": 5.0}, 10, 2)
    all_of_them = method(student, teacher, step).sums["t2s_kd"]
    assert all_of_them > few
    assert method.observe({"labelled": 0.0, "t2s_agreed": 0.0}, 10, 3) == {"t2s_agreement": 0.625}
    resumed, *_ = _one(agreement=0.5)
    resumed.restore(method.state())
    assert resumed(student, teacher, step).sums["t2s_kd"] == all_of_them


def test_by_default_only_agreeing_rows_ever_count():
    method, student, teacher, step, _ = _one()
    few = method(student, teacher, step).sums["t2s_kd"]
    method.observe({"labelled": 8.0, "t2s_agreed": 8.0}, 10, 1)
    assert method(student, teacher, step).sums["t2s_kd"] == few


def test_a_checkpoint_holds_what_is_learned_and_the_rest_comes_from_the_heads():
    method, student, teacher, step, vocabulary = _one()
    resumed = DskdEta(DskdEta.Settings(), Shape(5, 5, 12), Shape(6, 6, 14), vocabulary).double()
    resumed.initialize(student.head.detach(), teacher.head)
    method.t2s.weight.data += 0.1
    resumed.load_state_dict(method.state_dict())
    assert set(method.state_dict()) == {"t2s.weight"}
    assert resumed(student, teacher, step).total == method(student, teacher, step).total


def test_without_a_pair_it_is_fine_tuning():
    method, student, teacher, _, _ = _one()
    terms = method(student, teacher, Step(pairs=torch.zeros(0, 2, dtype=torch.long)))
    assert all(value == 0 for name, value in (terms.sums | terms.diagnostics).items() if name != "ce")
    torch.testing.assert_close(terms.total.detach(), 0.5 * terms.sums["ce"])


def test_it_insists_on_the_vocabularies():
    with pytest.raises(ValueError, match="vocabularies"):
        DskdEta(DskdEta.Settings(), Shape(5, 5, 23), Shape(6, 6, 31))
