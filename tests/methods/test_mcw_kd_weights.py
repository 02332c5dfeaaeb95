"""mcw_kd: how the weights of its costs move, its settings, and that it learns."""

import json
from dataclasses import replace

import pytest
import torch

from kdbench import models
from kdbench.losses.ot import cost_weights, project_to_simplex
from kdbench.methods.base import Needs, Shape
from kdbench.methods.mcw_kd import COSTS, McwKd
from kdbench.signals import Signal
from tests import tiny
from tests.methods.mcw import EXACT, FIRST, given, step_of


def _sums(shares):
    """Diagnostics of a step of 10 tokens."""
    return {
        f"paid_{family}_{name}": 10 * shares[family][k] for family, of in COSTS.items() for k, name in enumerate(of)
    }


def _history(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(steps, len(COSTS), 3, generator=generator, dtype=torch.float64).tolist()
    return [dict(zip(COSTS, of, strict=True)) for of in numbers]


def test_weights_move_to_the_projection_of_the_mean_every_so_many_steps():
    method = given(update_every=3, sigma=0.7, floor=0.02)[0]
    history = _history(7)
    for number, shares in enumerate(history, 1):
        logged = method.observe(_sums(shares), 10, number)
        for family, names in COSTS.items():
            last = number - number % 3
            expected = FIRST[family]
            if last:
                mean = torch.tensor([of[family] for of in history[last - 3 : last]], dtype=torch.float64).mean(0)
                expected = project_to_simplex(1 / 3 - mean / 1.4, 0.02).tolist()
            assert method.weights[family] == pytest.approx(expected, rel=1e-9)
            assert [logged[f"alpha_{family}_{name}"] for name in names] == method.weights[family]
            assert sum(method.weights[family]) == pytest.approx(1)


def test_the_mean_is_over_tokens_not_over_steps():
    method = given(update_every=2)[0]
    one, other = _history(2)
    method.observe({name: value / 10 for name, value in _sums(one).items()}, 1, 1)
    method.observe({name: 9 * value / 10 for name, value in _sums(other).items()}, 9, 2)
    for family in COSTS:
        mean = [0.1 * a + 0.9 * b for a, b in zip(one[family], other[family], strict=True)]
        mean = torch.tensor(mean, dtype=torch.float64)
        assert method.weights[family] == pytest.approx(cost_weights(mean, 2.0, 0.01).tolist(), rel=1e-9)


def test_a_training_that_resumes_moves_its_weights_as_one_that_does_not():
    history = _history(9)
    whole, first, second = (given(update_every=4)[0] for _ in range(3))
    for number, shares in enumerate(history, 1):
        expected = whole.observe(_sums(shares), 10, number)
        if number <= 6:
            first.observe(_sums(shares), 10, number)
            if number == 6:
                state = json.loads(json.dumps(first.state()))
                first.observe(_sums(shares), 10, 7)  # what is saved does not move with what is not
                second.restore(state)
        else:
            assert second.observe(_sums(shares), 10, number) == expected
    assert second.state() == whole.state()
    assert whole.weights != FIRST


def test_the_weights_are_those_of_the_loss():
    method, student, teacher, step = given()
    method.restore({"weights": {"logits": [1.0, 0.0, 0.0], "hidden": [0.0, 1.0, 0.0]}, "seen": {}, "tokens": 0})
    alone = given(logits_weights=[1.0, 0.0, 0.0], hidden_weights=[0.0, 1.0, 0.0], floor=0.0)[0]
    assert method(student, teacher, step).total == alone(student, teacher, step).total


def test_the_unit_of_a_cost_does_not_move_its_weight():
    """Salience of a hundredth is a cost of about a hundredth; what the weights follow stays about the same. Published: it would win."""
    method, student, teacher, step = given(logits_weights=[0.49, 0.49, 0.02])
    with torch.no_grad():
        method.salience.bias.zero_()
    before = method(student, teacher, step).diagnostics
    with torch.no_grad():
        method.salience.weight.mul_(0.01)
    after = method(student, teacher, step).diagnostics
    assert after["cost_logits_salience"] < 0.02 * before["cost_logits_salience"]
    torch.testing.assert_close(after["paid_logits_salience"], before["paid_logits_salience"], rtol=0.1, atol=0)


def test_of_the_semi_dual_they_are_learned_by_gradient_and_start_uniform():
    method, student, teacher, step = given(solver="semi_dual", **EXACT)
    assert method.observe({}, 10, 1000) == method.state() == {}
    terms = method(student, teacher, step)
    for family, names in COSTS.items():
        beta = getattr(method, f"beta_{family}")
        assert [round(terms.diagnostics[f"alpha_{family}_{name}"].item() / 9, 6) for name in names] == [0.333333] * 3
        (gradient,) = torch.autograd.grad(terms.total, beta, retain_graph=True)
        dual = torch.stack([terms.diagnostics[f"dual_{family}_{name}"] for name in names])
        weight = getattr(method.settings, f"w_{family}")
        torch.testing.assert_close(gradient, weight * (dual - dual.mean()) / 3, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(terms.sums[f"ot_{family}"], dual.mean(), rtol=1e-9, atol=0)
    chosen = given(solver="semi_dual", logits_weights=[0.2, 0.5, 0.3])[0]
    torch.testing.assert_close(chosen.beta_logits.softmax(0), torch.tensor([0.2, 0.5, 0.3]).double(), rtol=1e-6, atol=0)


# --- settings ---


def test_constants_of_the_older_scripts():
    settings = McwKd.Settings()
    assert (settings.ce_rate, settings.kd_rate, settings.w_logits, settings.w_hidden) == (10.0, 2.5, 50.0, 10.0)
    assert (settings.temperature, settings.ot_temperature, settings.top_k, settings.window) == (3.0, 2.0, 300, 4)
    assert (settings.sigma, settings.floor, settings.update_every) == (2.0, 0.01, 1000)
    assert {family: settings.first_weights(family) for family in COSTS} == FIRST


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solver": "semi_dual", "debiased": True}, "`debiased` is set but `solver` is semi_dual"),
        ({"solver": "semi_dual", "update_every": 20}, "only sinkhorn reads it"),
        ({"logits_weights": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"hidden_weights": [0.0, 0.5, 0.5]}, "at least `floor`"),
        ({"hidden_weights": [0.5, 0.5]}, "at least 3 items"),
        ({"floor": 0.4}, "less than or equal"),
        ({"alignment": "dtw"}, "'index' or 'byte'"),
        ({"epsilon": 0.0}, "greater than 0"),
        ({"skew_lambda": 0.2}, "only skewed_forward_kl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        McwKd.Settings(**settings)


def test_needs():
    def needs(**settings):
        return McwKd.needs(McwKd.Settings(**settings))

    assert needs() == Needs("signal", alignment="byte", spelling=True)
    assert needs(alignment="index", causal=True) == Needs("signal", alignment="index", spelling=True, chunks=True)


def test_it_insists_on_pairs_and_spelling():
    method, student, teacher, step = given()
    for without in ({"pairs": None}, {"spelling": None}):
        with pytest.raises(ValueError, match=r"asks for (pairs of rows|distances of spelling)"):
            method(student, teacher, replace(step, **without))


# --- training ---

LENGTHS = ((3, 14), (7, 9), (2, 20), (5, 1)), ((4, 11), (6, 12), (3, 16), (5, 2))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"update_every": 10}, {"solver": "semi_dual"}])
def test_fifty_steps_lower_the_transport_and_move_the_weights(settings):
    sizes = 38, 48
    torch.manual_seed(0)
    student, teacher = tiny.gpt2(40), tiny.qwen2(50).requires_grad_(False)
    data = [tiny.tokens(size, lengths) for size, lengths in zip(sizes, LENGTHS, strict=True)]
    method = McwKd(McwKd.Settings(**settings), Shape(16, 16, 38), Shape(24, 24, 48))
    groups = [{"params": list(student.parameters()), "lr": 3e-3}, {"params": list(method.parameters()), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups)
    history = []
    for number in range(50):
        sides = [tiny.side(of, range(4)) for of in data]
        signals: list[Signal] = [
            models.signal(model, side, size) for model, side, size in zip((student, teacher), sides, sizes, strict=True)
        ]
        # With the teacher's share held fixed, so that one step's loss may be compared with another's.
        terms = method(*signals, step_of(*signals, progress=0.5))
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_([*student.parameters(), *method.parameters()], 1.0)
        optimizer.step()
        tokens = len(signals[0].rows.targets)
        values = {name: value.item() for name, value in (terms.sums | terms.diagnostics).items()}
        means = {name: value / tokens for name, value in values.items()}
        history.append(means | method.observe(values, tokens, number + 1))
    first, last = history[0], history[-1]
    assert last["ce"] < 0.5 * first["ce"]
    assert last["ot_hidden"] < 0.7 * first["ot_hidden"]
    assert last["ot_logits"] < first["ot_logits"]
    for family, names in COSTS.items():
        weights = [[of[f"alpha_{family}_{name}"] for name in names] for of in (first, last)]
        assert weights[0] != weights[1]
        assert sum(weights[1]) == pytest.approx(1, abs=1e-5)
        assert min(weights[1]) > 0
