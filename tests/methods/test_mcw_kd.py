"""mcw_kd: its formula sequence by sequence, its options, and what must not change it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses import ot
from kdbench.methods.base import Shape
from kdbench.methods.dskd_cma import DskdCma
from kdbench.methods.mcw_kd import COSTS
from kdbench.signals import Head, Step
from tests.methods.cases import random_signals
from tests.methods.mcw import EXACT, FIRST, PURE, costs_of, given, method_of, plan_of, step_of


def _leaves(method, student):
    return {
        "hidden": student.rows.hidden,
        "head": student.head.weight,
        **dict(method.ot.named_parameters(prefix="ot")),
        **dict(method.salience.named_parameters(prefix="salience")),
    }


def _gradients(loss, leaves):
    return torch.autograd.grad(
        loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("elements", [1, 60, 2**24])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 7, "window": 1, "epsilon": 0.3, "w_logits": 3.0},
        {
            "logits_weights": [0.6, 0.2, 0.2],
            "hidden_weights": [0.05, 0.05, 0.9],
            "ot_temperature": 0.7,
            "w_hidden": 2.0,
        },
        {"top_k": 2, "window": 0, **PURE},
    ],
)
def test_transport_terms_and_gradients_are_those_of_the_formula(settings, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    method, student, teacher, step = given(**EXACT, **settings)
    terms, counts = method(student, teacher, step), student.rows.counts.tolist()
    expected, means = {}, {}
    for family, names in COSTS.items():
        weights = settings.get(f"{family}_weights", FIRST[family])
        expected[family] = 0.0
        for n, costs in zip(counts, costs_of(method, student, teacher, step), strict=True):
            cost = sum(weight * of for weight, of in zip(weights, costs[family], strict=True))
            plan = plan_of(cost, method.settings.epsilon * cost.mean().item())
            expected[family] = expected[family] + n * (plan * cost).sum()
            for name, of in zip(names, costs[family], strict=True):
                sums = torch.stack([of.mean(), (plan * of).sum() / of.mean()]).detach()
                means[f"{family}_{name}"] = means.get(f"{family}_{name}", 0.0) + n * sums
        torch.testing.assert_close(terms.sums[f"ot_{family}"], expected[family].detach(), rtol=1e-6, atol=1e-9)
    for name, (cost, paid) in means.items():
        torch.testing.assert_close(terms.diagnostics[f"cost_{name}"], cost, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(terms.diagnostics[f"paid_{name}"], paid, rtol=1e-6, atol=1e-9)
    reference = DskdCma.forward(method.cma, student, teacher, step)
    total = method.settings.w_logits * expected["logits"] + method.settings.w_hidden * expected["hidden"]
    torch.testing.assert_close(terms.total, reference.total + total, rtol=1e-7, atol=0)
    leaves = _leaves(method, student)
    found, wanted = _gradients(terms.total - reference.total, leaves), _gradients(total, leaves)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_the_other_terms_are_those_of_dskd_cma_with_its_settings():
    settings = {"ce_rate": 0.3, "kd_rate": 1.7, "temperature": 1.5, "objective": "reverse_kl", "renormalise": True}
    method, student, teacher, step = given(**settings, w_logits=0.0, w_hidden=0.0)
    alone = DskdCma(DskdCma.Settings(**settings), Shape(5, 5, 23), Shape(6, 6, 31)).double()
    alone.load_state_dict(method.cma.state_dict())
    terms, expected = method(student, teacher, step), alone(student, teacher, step)
    assert terms.total == expected.total
    assert terms.sums.keys() == {*expected.sums, "ot_logits", "ot_hidden"}
    assert all(terms.sums[name] == value for name, value in expected.sums.items())


def _check_gradient(gradient, loss, hidden):
    """Central differences along random directions."""
    for seed in range(3):
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=hidden.dtype)
        with torch.no_grad():
            difference = (loss(hidden + 1e-6 * direction) - loss(hidden - 1e-6 * direction)).item()
        assert (gradient * direction).sum().item() == pytest.approx(difference / 2e-6, rel=1e-5)


def _of(student, hidden):
    return replace(student, rows=replace(student.rows, hidden=hidden))


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "semi_dual", **EXACT},
        {"unrolled": True, "tolerance": 0.0, "iterations": 30},
        {"unrolled": True, "tolerance": 0.0, "iterations": 30, "debiased": True},
    ],
)
def test_of_the_semi_dual_and_unrolled_the_gradient_is_that_of_the_loss(settings, monkeypatch):
    """ε in units of the cost: what it is relative to is a constant of the gradient."""

    def with_epsilon(function):
        return lambda *costs, epsilon, **others: function(*costs, epsilon=0.05, relative=False, **others)

    for function in (ot.sinkhorn, ot.sinkhorn_divergence):
        monkeypatch.setattr(f"kdbench.methods.mcw_kd.{function.__name__}", with_epsilon(function))
    method, student, teacher, step = given(**PURE, **settings, ce_rate=0.0, kd_rate=0.0)
    hidden = student.rows.hidden
    (gradient,) = torch.autograd.grad(method(student, teacher, step).total, hidden)
    _check_gradient(gradient, lambda of: method(_of(student, of), teacher, step).total, hidden)


def test_with_the_plan_held_fixed_the_gradient_is_that_of_the_regularised_cost():
    """Of ⟨P, C⟩ + ε KL(P ‖ μ νᵀ) at its least, with the ε of the step (envelope theorem)."""
    method, student, teacher, step = given(**PURE, **EXACT, ce_rate=0.0, kd_rate=0.0)
    weights = {"logits": method.settings.w_logits, "hidden": method.settings.w_hidden}

    def combined(student):
        return [
            (n * weights[family], sum(share * cost for share, cost in zip(FIRST[family], costs[family], strict=True)))
            for n, costs in zip(student.rows.counts.tolist(), costs_of(method, student, teacher, step), strict=True)
            for family in COSTS
        ]

    epsilons = [0.1 * cost.mean().item() for _, cost in combined(student)]

    def regularised(hidden):
        total = 0.0
        for (weight, cost), epsilon in zip(combined(_of(student, hidden)), epsilons, strict=True):
            plan = plan_of(cost, epsilon)
            divergence = (plan * (plan * cost.numel()).log()).sum()
            total = total + weight * ((plan * cost).sum() + epsilon * divergence)
        return total

    hidden = student.rows.hidden
    (gradient,) = torch.autograd.grad(method(student, teacher, step).total, hidden)
    _check_gradient(gradient, regularised, hidden)


def test_the_student_is_a_constant_where_it_is_mixed_in():
    """At t = 0 a paired row of the teacher is the student's own: the divergence is 0, and pulls at nothing."""
    student, teacher = random_signals("mcw_kd")
    frozen = {
        "interpolation_start": 0.0,
        "interpolation_end": 0.0,
        "logits_weights": [0.01, 0.98, 0.01],
        "ce_rate": 0.0,
    }
    method = method_of(student, teacher, kd_rate=0.0, w_hidden=0.0, **frozen)
    step = replace(
        step_of(student, teacher), pairs=torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]])
    )
    costs = costs_of(method, student, teacher, step)
    assert all(of["logits"][1].diagonal().abs().max() < 1e-12 for of in costs)
    terms = method(student, teacher, step)
    assert torch.autograd.grad(terms.total, student.head.weight)[0].isfinite().all()
    assert terms.sums["ot_logits"] < given(**PURE)[0](student, teacher, step).sums["ot_logits"]


def test_the_share_of_the_teacher_grows_with_progress():
    method, student, teacher, _ = given()
    values = [
        method(student, teacher, step_of(student, teacher, of)).sums["ot_logits"].item() for of in (0.0, 0.5, 1.0)
    ]
    pure = given(**PURE)[0](student, teacher, step_of(student, teacher)).sums["ot_logits"].item()
    assert values[0] < values[1] < values[2] == pytest.approx(pure, rel=1e-12)


def test_without_pairs_nothing_is_mixed_and_nothing_breaks():
    method, student, teacher, step = given(anchor_rate=1.0)
    alone = method(student, teacher, replace(step, pairs=torch.zeros(0, 2, dtype=torch.long)))
    pure = given(anchor_rate=1.0, **PURE)[0](student, teacher, step)
    assert alone.sums["ot_logits"] == pure.sums["ot_logits"]
    assert alone.sums["anchor"] == alone.diagnostics["aligned"] == 0
    gradients = torch.autograd.grad(alone.total, list(method.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_spelling_is_read_at_every_cell():
    """Not on a path alone, as published."""
    method, student, teacher, step = given(hidden_weights=[0.98, 0.01, 0.01], epsilon=0.5)
    before = method(student, teacher, step)
    real = torch.ones_like(step.spelling, dtype=torch.bool)
    real[1, :, 3:] = real[0, 4:] = False
    for cell in real.nonzero().tolist():
        spelling = step.spelling.clone()
        spelling[tuple(cell)] += 0.5
        changed = (
            method(student, teacher, replace(step, spelling=spelling)).sums["ot_hidden"] - before.sums["ot_hidden"]
        )
        assert changed.abs() > 1e-5
    padded = replace(step, spelling=step.spelling.masked_fill(~real, 7.0))
    assert method(student, teacher, padded).total == before.total


def _of_itself(**settings):
    """A teacher that is the student, projected by the identity, and all costs 0 on the diagonal."""
    student, _ = random_signals("mcw_kd")
    method = method_of(student, student, ce_rate=0.0, kd_rate=0.0, **settings)
    with torch.no_grad():
        method.ot.weight.copy_(torch.eye(5))
        method.ot.bias.zero_()
    rows = torch.arange(len(student.rows.targets))
    inputs = [student.rows.inputs[student.rows.sequence == b] for b in (0, 1)]
    spelling = torch.zeros(2, 5, 5)
    for b, ids in enumerate(inputs):
        spelling[b, : len(ids), : len(ids)] = (ids[:, None] != ids).float()
    return method(student, student, Step(0.25, torch.stack([rows, rows], 1), None, spelling)), student


def test_debiased_a_student_equal_to_its_teacher_costs_nothing():
    debiased, student = _of_itself(debiased=True, epsilon=1.0)
    plain, _ = _of_itself(epsilon=1.0)
    for name in ("ot_logits", "ot_hidden"):
        assert abs(debiased.sums[name].item()) < 1e-6
        assert plain.sums[name] > 1e-2
    assert torch.autograd.grad(debiased.total, student.rows.hidden)[0].isfinite().all()


def test_the_anchor_is_the_cross_entropy_of_projected_states_at_pairs():
    method, student, teacher, step = given(anchor_rate=0.7)
    terms, without = method(student, teacher, step), given()[0](student, teacher, step)
    ours, theirs = step.pairs.unbind(1)
    logits = method.ot(teacher.rows.hidden)[theirs] @ student.head.weight.detach().T
    anchor = F.cross_entropy(logits, student.rows.targets[ours], reduction="sum")
    torch.testing.assert_close(terms.sums["anchor"], anchor.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, without.total + 0.7 * anchor, rtol=1e-12, atol=0)
    assert "anchor" not in without.sums
    heads = [torch.autograd.grad(of.total, student.head.weight)[0] for of in (terms, without)]
    torch.testing.assert_close(*heads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"solver": "semi_dual"}, {"debiased": True}])
def test_other_sequences_of_the_batch_have_no_say(settings):
    method, student, teacher, step = given(**settings)
    before = torch.autograd.grad(method(student, teacher, step).total, student.rows.hidden)[0]
    other = [_of(of, torch.cat([of.rows.hidden[:4], 9 * of.rows.hidden[4:]])) for of in (student, teacher)]
    after = torch.autograd.grad(method(*other, step).total, student.rows.hidden)[0]
    torch.testing.assert_close(after[:4], before[:4], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(after[4:], before[4:])


@pytest.mark.parametrize("settings", [{}, {"solver": "semi_dual"}])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_not_hidden(side, settings):
    method, *signals, step = given(**settings)
    with torch.no_grad():
        signals[side].rows.hidden[6] = torch.nan
    terms = method(*signals, step)
    assert terms.sums["ot_logits"].isnan()
    assert terms.sums["ot_hidden"].isnan()


def test_rows_of_a_head_beyond_the_tokenizer_do_not_reach_the_transport():
    method, student, teacher, step = given()
    before = method(student, teacher, step).sums
    with torch.no_grad():
        student.head.weight[student.head.size :] *= 9
        teacher.head.weight[teacher.head.size :] *= 9
    assert method(student, teacher, step).sums["ot_logits"] == before["ot_logits"]


def test_a_bias_of_the_head_counts():
    method, student, teacher, step = given()
    bias = torch.zeros(student.head.weight.shape[0], dtype=torch.float64).index_fill(0, torch.tensor([7]), 5.0)
    lifted = replace(student, head=Head(student.head.weight, student.head.size, bias))
    assert method(lifted, teacher, step).sums["ot_logits"] != method(student, teacher, step).sums["ot_logits"]


def test_diagnostics():
    method, student, teacher, step = given()
    found = method(student, teacher, step).diagnostics
    for family in COSTS:
        assert found[f"marginal_error_{family}"] < 9 * 1e-3
        assert 1 <= found[f"iterations_{family}"] / 9 < 200
    assert found["aligned"] == len(step.pairs)
    assert {"t2s_correct", "s2t_correct", "teacher_entropy"} <= found.keys()
    looser = given(iterations=1)[0](student, teacher, step).diagnostics
    assert looser["marginal_error_logits"] > found["marginal_error_logits"]
