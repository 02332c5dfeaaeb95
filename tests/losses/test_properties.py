"""What must hold of every divergence for any logits, found wanting by search (hypothesis) rather than by example."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.losses.divergences import OBJECTIVES
from kdbench.losses.uld import sorted_l1

every = pytest.mark.parametrize("name", OBJECTIVES)
search = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SYMMETRIC = {"js_divergence", "total_variation"}
LARGEST = {"js_divergence": math.log(2), "total_variation": 1.0}
LOGIT = st.floats(-30, 30, allow_nan=False, width=32)
TEMPERATURE = st.sampled_from([0.5, 1.0, 2.0, 7.0])


@st.composite
def logits(draw, sides=2, holes=False, distinct=False):
    """Rows of logits of one vocabulary for some sides, float64: (r, V) each; with holes some are -inf, one of a row never is."""
    rows, size = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    found = []
    for _ in range(sides):
        values = [draw(st.lists(LOGIT, min_size=size, max_size=size, unique=distinct)) for _ in range(rows)]
        tensor = torch.tensor(values, dtype=torch.float64)
        if holes:
            masks = [draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(rows)]
            mask = torch.tensor(masks)
            mask[torch.arange(rows), [draw(st.integers(0, size - 1)) for _ in range(rows)]] = False
            tensor = tensor.masked_fill(mask, -torch.inf)
        found.append(tensor)
    return found


def gradient_of(name, student, teacher, temperature=1.0):
    leaf = student.clone().requires_grad_()
    loss = OBJECTIVES[name](leaf, teacher, temperature)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@every
@search
@given(logits(), TEMPERATURE)
def test_never_negative_nor_beyond_its_bound(name, pair, temperature):
    found = OBJECTIVES[name](*pair, temperature)
    assert found.shape == pair[0].shape[:1]
    assert (found >= -1e-12).all()
    assert (found <= LARGEST.get(name, math.inf) + 1e-12).all()


@every
@search
@given(logits(sides=1), TEMPERATURE, st.floats(-50, 50))
def test_zero_at_equality_where_nothing_is_to_learn(name, one, temperature, constant):
    """A constant that is added to all logits changes no distribution. (Total variation has a kink at 0, its gradient is 0 there alone.)"""
    found, gradient = gradient_of(name, one[0], one[0], temperature)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    moved = OBJECTIVES[name](one[0] + constant, one[0], temperature)
    torch.testing.assert_close(moved, torch.zeros_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SYMMETRIC))
@search
@given(logits(), TEMPERATURE)
def test_symmetric(name, pair, temperature):
    forth, back = OBJECTIVES[name](*pair, temperature), OBJECTIVES[name](*pair[::-1], temperature)
    torch.testing.assert_close(forth, back, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - SYMMETRIC))
def test_the_others_tell_student_and_teacher_apart(name):
    peaked, flat = torch.tensor([[6.0, 0.0, 0.0, 0.0, -1.0]]), torch.tensor([[0.0, 0.2, 0.4, 0.1, 0.3]])
    assert (OBJECTIVES[name](peaked, flat) - OBJECTIVES[name](flat, peaked)).abs() > 1e-2


@every
@search
@given(logits(distinct=True), st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(name, pair, random):
    """Nor does it for adaptive_kl, as long as no two tokens are equally likely: their order decides which is in the tail."""
    order = list(range(pair[0].shape[1]))
    random.shuffle(order)
    found, gradient = gradient_of(name, *pair)
    moved, moved_gradient = gradient_of(name, *(of[:, order] for of in pair))
    torch.testing.assert_close(moved, found, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-10, atol=1e-12)


@every
@search
@given(logits(), TEMPERATURE)
def test_temperature_divides_the_logits(name, pair, temperature):
    torch.testing.assert_close(
        OBJECTIVES[name](*pair, temperature), OBJECTIVES[name](*(of / temperature for of in pair))
    )


@every
@search
@given(logits(holes=True))
def test_finite_where_tokens_are_impossible(name, pair):
    """A teacher of one token is the case of a single hole-free logit."""
    found, gradient = gradient_of(name, *pair)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[pair[0] == -torch.inf] == 0).all()


@every
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_finite_on_a_one_hot_teacher_in_float32(name, scale):
    teacher = torch.full((2, 50), -scale)
    teacher[:, 7] = scale
    found, gradient = gradient_of(name, torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), teacher)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert (found > 0).all()


@search
@given(logits())
def test_pinsker(pair):
    """Total variation is at most √(KL / 2): two formulas that know nothing of each other."""
    bound = (OBJECTIVES["forward_kl"](*pair).clamp(min=0) / 2).sqrt()
    assert (OBJECTIVES["total_variation"](*pair) <= bound + 1e-7).all()


@search
@given(logits(), st.randoms(use_true_random=False), st.integers(0, 4))
def test_sorted_l1_knows_no_vocabulary(pair, random, impossible):
    """Any order of either vocabulary, and any tokens that are impossible in one: the same, between 0 and 2, and both ways."""
    student, teacher = pair
    found = sorted_l1(student, teacher)
    orders = [random.sample(range(student.shape[1]), student.shape[1]) for _ in range(2)]
    more = torch.nn.functional.pad(teacher[:, orders[1]], (impossible, 0), value=-torch.inf)
    torch.testing.assert_close(sorted_l1(student[:, orders[0]], more), found, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sorted_l1(teacher, student), found, rtol=1e-10, atol=1e-12)
    assert (found <= 2).all()
    assert torch.equal(sorted_l1(student, student), torch.zeros_like(found))
    assert (found <= 2 * OBJECTIVES["total_variation"](student, teacher) + 1e-12).all()  # sorting is the best matching
