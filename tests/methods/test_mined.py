"""mined: its formula row by row, its options, and what it comes to where there is nothing to move."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import OBJECTIVES
from kdbench.methods.base import Shape
from kdbench.methods.mined import Mined
from kdbench.methods.vanilla_kd import VanillaKd
from kdbench.signals import Head, Rows, Signal, Step, Vocabulary

STUDENT, TEACHER, EXTRA = 23, 31, 3  # tokens, and rows that a head has beyond them
PAIRS = torch.tensor([[0, 1], [2, 1], [3, 3], [4, 4], [5, 5], [8, 6]])
NEAREST = torch.randint(STUDENT, (TEACHER,), generator=torch.Generator().manual_seed(4))


def _vocabulary(nearest=NEAREST):
    unread = torch.zeros(0, dtype=torch.long)
    return Vocabulary(nearest, unread, unread, unread, unread)


def _rows(count, width, vocabulary, generator):
    counts = torch.tensor([4, count - 4])
    targets, inputs = (torch.randint(vocabulary, (count,), generator=generator) for _ in range(2))
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return Rows(hidden, targets, torch.repeat_interleave(torch.arange(2), counts), counts, inputs)


def _signals(seed=0):
    """Nine rows and seven; of the pairs all but the third have read the token nearest to the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = _rows(9, 5, STUDENT, generator), _rows(7, 6, TEACHER, generator)
    inputs = ours.inputs.clone()
    inputs[PAIRS[:, 0]] = NEAREST[theirs.inputs[PAIRS[:, 1]]]
    inputs[3] = (inputs[3] + 1) % STUDENT
    heads = [
        Head(torch.randn(size + EXTRA, width, generator=generator, dtype=torch.float64), size)
        for size, width in ((STUDENT, 5), (TEACHER, 6))
    ]
    ours.hidden.requires_grad_()
    heads[0].weight.requires_grad_()
    return Signal(replace(ours, inputs=inputs), heads[0], None), Signal(theirs, heads[1], None)


ALIGNED = [tuple(pair) for pair in PAIRS.tolist() if pair[0] != 3]


def _method(nearest=NEAREST, **settings):
    shapes = Shape(5, 5, STUDENT), Shape(6, 6, len(nearest))
    return Mined(Mined.Settings(**settings), *shapes, _vocabulary(nearest))


def _moved(row, preimage):
    """One row of the teacher's logits, token by token of the student."""
    found = [[row[t] for t in range(TEACHER) if NEAREST[t] == v] for v in range(STUDENT)]
    choose = {"max": lambda of: max(of, key=lambda value: value.item()), "first": lambda of: of[0]}[preimage]
    return torch.stack([choose(of) if of else torch.tensor(-torch.inf, dtype=torch.float64) for of in found])


def _plain(student, teacher, objective="forward_kl", temperature=2.0, preimage="max"):
    """Cross entropy, divergence on aligned rows, and cross entropy at the temperature on the others."""
    z_s = student.rows.hidden @ student.head.weight.T
    z_t = (teacher.rows.hidden @ teacher.head.weight.T)[:, :TEACHER]
    y = student.rows.targets
    kd = sum(
        OBJECTIVES[objective](z_s[i : i + 1, :STUDENT], _moved(z_t[j], preimage)[None], temperature).sum()
        for i, j in ALIGNED
    )
    others = [i for i in range(9) if i not in dict(ALIGNED)]
    one_hot = F.cross_entropy(z_s[others, :STUDENT] / temperature, y[others], reduction="sum")
    return F.cross_entropy(z_s, y, reduction="sum"), kd, one_hot


@pytest.mark.parametrize("elements", [1, 60, 2**24])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preimage": "first"},
        {"objective": "reverse_kl", "temperature": 1.5, "ce_rate": 1.0, "kd_rate": 3.0},
        {"objective": "js_divergence"},
    ],
)
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks(settings, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    student, teacher = _signals()
    method = _method(**settings)
    terms = method(student, teacher, Step(pairs=PAIRS))
    of_formula = {name: value for name, value in settings.items() if name in ("objective", "temperature", "preimage")}
    ce, kd, one_hot = _plain(student, teacher, **of_formula)
    plain = method.settings.ce_rate * ce + method.settings.kd_rate * (kd + one_hot)
    torch.testing.assert_close(terms.total, plain, rtol=1e-12, atol=0)
    for name, value in {"ce": ce, "kd": kd, "one_hot": one_hot}.items():
        torch.testing.assert_close(terms.sums[name], value.detach(), rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight]
    found, wanted = torch.autograd.grad(terms.total, leaves), torch.autograd.grad(plain, leaves)
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_rows_without_a_teacher_can_be_left_alone():
    student, teacher = _signals()
    ce, kd, _ = _plain(student, teacher)
    terms = _method(unaligned="skip")(student, teacher, Step(pairs=PAIRS))
    assert terms.sums.keys() == {"ce", "kd"}
    torch.testing.assert_close(terms.total, 0.5 * ce + 0.5 * kd, rtol=1e-12, atol=0)


def test_squared_temperature_multiplies_the_divergence_and_its_stand_in():
    student, teacher = _signals()
    plain, squared = (
        _method(temperature=3.0, squared_temperature=on)(student, teacher, Step(pairs=PAIRS)).sums
        for on in (False, True)
    )
    for name in ("kd", "one_hot"):
        torch.testing.assert_close(squared[name], 9 * plain[name])
    assert squared["ce"] == plain["ce"]


def test_diagnostics():
    student, teacher = _signals()
    found = _method()(student, teacher, Step(pairs=PAIRS)).diagnostics
    z_t = (teacher.rows.hidden @ teacher.head.weight.T)[:, :TEACHER]
    moved = torch.stack([_moved(z_t[j], "max") for _, j in ALIGNED])
    p = moved.softmax(-1)
    assert found.keys() == {"aligned", "teacher_correct", "teacher_entropy"}
    assert found["aligned"].item() == 5
    targets = student.rows.targets[[i for i, _ in ALIGNED]]
    assert found["teacher_correct"].item() == (moved.argmax(-1) == targets).sum().item()
    torch.testing.assert_close(found["teacher_entropy"], -(p * p.clamp(min=1e-300).log()).sum())


@pytest.mark.parametrize("pairs", [PAIRS, torch.zeros(0, 2, dtype=torch.long)])
def test_without_a_matching_token_it_is_fine_tuning_at_two_temperatures(pairs):
    student, teacher = _signals()
    inputs = (NEAREST[teacher.rows.inputs][PAIRS[:, 1]] + 1) % STUDENT
    unlike = student.rows.inputs.index_put((PAIRS[:, 0],), inputs)
    student = replace(student, rows=replace(student.rows, inputs=unlike))
    terms = _method()(student, teacher, Step(pairs=pairs))
    z_s, y = student.rows.hidden @ student.head.weight.T, student.rows.targets
    expected = F.cross_entropy(z_s, y, reduction="sum") + F.cross_entropy(z_s[:, :STUDENT] / 2, y, reduction="sum")
    torch.testing.assert_close(terms.total, 0.5 * expected, rtol=1e-12, atol=0)
    assert terms.sums["kd"] == terms.diagnostics["aligned"] == 0
    (gradient,) = torch.autograd.grad(terms.total, student.rows.hidden)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("preimage", ["max", "first"])
def test_with_one_tokenizer_it_is_vanilla_kd(preimage):
    student, teacher = _signals()
    rows = replace(student.rows, hidden=torch.randn(9, 6, dtype=torch.float64))
    teacher = Signal(rows, Head(teacher.head.weight[: STUDENT + EXTRA], STUDENT), None)
    pairs = torch.arange(9)[:, None].expand(-1, 2)
    ours = _method(torch.arange(STUDENT), preimage=preimage)(student, teacher, Step(pairs=pairs))
    plain = VanillaKd(VanillaKd.Settings(), None, None)(student, teacher, Step())
    assert ours.sums["one_hot"] == 0
    assert ours.diagnostics["aligned"] == 9
    torch.testing.assert_close(ours.total, plain.total, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(of.total, student.rows.hidden)[0] for of in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_vocabularies_does_not_matter():
    student, teacher = _signals()
    expected = _method()(student, teacher, Step(pairs=PAIRS))
    generator = torch.Generator().manual_seed(6)
    ours, theirs = (torch.randperm(size, generator=generator) for size in (STUDENT, TEACHER))
    new_id, new_teacher_id = ours.argsort(), theirs.argsort()

    def shuffled(signal, order, new_id):
        weight = torch.cat([signal.head.weight[order], signal.head.weight[len(order) :]])
        rows = replace(signal.rows, targets=new_id[signal.rows.targets], inputs=new_id[signal.rows.inputs])
        return Signal(rows, Head(weight, signal.head.size), None)

    found = _method(new_id[NEAREST[theirs]])(
        shuffled(student, ours, new_id), shuffled(teacher, theirs, new_teacher_id), Step(pairs=PAIRS)
    )
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)


def test_rows_of_a_head_beyond_the_tokenizer_reach_the_cross_entropy_alone():
    student, teacher = _signals()
    before = _method()(student, teacher, Step(pairs=PAIRS))
    with torch.no_grad():
        student.head.weight[STUDENT:] += 1.0
        teacher.head.weight[TEACHER:] += 1.0
    after = _method()(student, teacher, Step(pairs=PAIRS))
    assert after.sums["ce"] != before.sums["ce"]
    for name in ("kd", "one_hot"):
        torch.testing.assert_close(after.sums[name], before.sums[name], rtol=1e-12, atol=0)


def test_a_teacher_that_is_not_finite_is_not_hidden():
    student, teacher = _signals()
    teacher.rows.hidden[1] = torch.nan
    assert _method()(student, teacher, Step(pairs=PAIRS)).total.isnan()


def test_it_insists_on_the_vocabularies_and_saves_nothing_of_them():
    with pytest.raises(ValueError, match="vocabularies"):
        Mined(Mined.Settings(), Shape(5, 5, STUDENT), Shape(6, 6, TEACHER))
    for preimage in ("max", "first"):
        method = _method(preimage=preimage)
        assert not method.state_dict()
        assert not list(method.parameters())
        assert method.nearest is dict(method.named_buffers())["nearest"]


def test_needs():
    needs = Mined.needs(Mined.Settings())
    assert (needs.teacher, needs.alignment, needs.vocabulary) == ("signal", "dtw", True)
    assert not needs.chunks
    assert not needs.spelling
