"""gold against the published loss, written as loops over chunks (trl.experimental.gold, ULDLoss with the hybrid loss)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kdbench.losses.divergences import js_divergence
from kdbench.methods.base import Needs, Shape
from kdbench.methods.gold import Gold
from kdbench.signals import Step, Vocabulary
from tests.methods import chunked, relations

SETTINGS = {
    "published constants": {},
    "published observed": {"rows": "input"},
    "published bayesian": {"merge": "bayesian"},
    "bayesian with the end": {"merge": "bayesian", "skip_end": False, "beta": 0.1},
    "temperatures": {"student_temperature": 2.0, "teacher_temperature": 3.0, "ce_rate": 0.4, "kd_rate": 1.7},
    "weights": {"matched_weight": 0.7, "unmatched_weight": 1.3, "beta": 0.0},
    "reverse": {"rows": "input", "beta": 1.0},
    "last read row": {"rows": "input", "merge": "bayesian"},
}
every = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
FLOOR = 1e-8  # of the published logarithms and factors


def _chunk(probabilities, signal, rows, settings, starts, floor):
    """The merged measure of one chunk on one side; None if no row is left of it."""
    if settings.rows == "input":  # the rows that have just read the chunk's tokens
        members = [
            (row + 1, signal.rows.targets[row])
            for row in rows
            if row + 1 < len(signal.rows.targets) and row + 1 not in starts
        ]
    else:
        members = [(row, signal.rows.targets[row]) for row in rows]
    if not members:
        return None
    base = members.pop(0 if settings.merge == "observed" else -1)[0]
    factor = torch.ones((), dtype=torch.float64)
    for row, token in members:
        factor = factor * probabilities[row, token].clamp(min=floor)
    return factor * probabilities[base]


def _jsd(q, p, beta, floor):
    q, p = q.clamp(min=floor).log(), p.clamp(min=floor).log()

    def kl(a, b):
        return (a.exp() * (a - b)).sum()

    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def _plain(method, student, teacher, vocabulary, floor=0.0, sequences=chunked.SEQUENCES):
    """Cross entropy, and the two parts: for each sequence its rows times the mean over its chunks."""
    settings, sides = method.settings, (student, teacher)
    temperatures = settings.student_temperature, settings.teacher_temperature
    z = [chunked.logits(of) for of in sides]
    q, p = (
        (of[:, : signal.head.size] / temperature).softmax(-1)
        for of, signal, temperature in zip(z, sides, temperatures, strict=True)
    )
    starts = [set((of.rows.counts.cumsum(0) - of.rows.counts).tolist()) for of in sides]
    ours, theirs = vocabulary.shared.unbind(1)
    rest = [[v for v in range(of.head.size) if v not in ids] for of, ids in zip(sides, (ours, theirs), strict=True)]
    parts, chunks = {}, chunked.rows_of_chunks(sequences)
    for index, (sequence, *rows) in enumerate(chunks):
        if settings.skip_end and (index + 1 == len(chunks) or chunks[index + 1][0] != sequence):
            continue
        merged = [
            _chunk(of, signal, own, settings, begins, floor)
            for of, signal, own, begins in zip((q, p), sides, rows, starts, strict=True)
        ]
        if merged[0] is None or merged[1] is None:
            continue
        matched = _jsd(merged[0][ours], merged[1][theirs], settings.beta, floor)
        unmatched = [of[ids].sort(descending=True).values for of, ids in zip(merged, rest, strict=True)]
        longest = max(map(len, unmatched))
        unmatched = [F.pad(of, (0, longest - len(of))) for of in unmatched]
        parts.setdefault(sequence, []).append(torch.stack([matched, (unmatched[0] - unmatched[1]).abs().sum()]))
    sums = [student.rows.counts[sequence] * torch.stack(of).mean(0) for sequence, of in parts.items()]
    ce = F.cross_entropy(z[0], student.rows.targets, reduction="sum")
    return ce, *(torch.stack(sums).sum(0) if sums else ce * torch.zeros(2))


def _compare(method, terms, student, plain, rtol=1e-11):
    for name, value in zip(("ce", "matched", "unmatched"), plain, strict=True):
        torch.testing.assert_close(terms.sums[name], value.detach(), rtol=rtol, atol=1e-14)
    settings, share = method.settings, 15 / 31 if len(method.student_rest) else 1.0
    weights = (
        (share, 1 - share) if settings.matched_weight is None else (settings.matched_weight, settings.unmatched_weight)
    )
    total = settings.ce_rate * plain[0] + settings.kd_rate * sum(
        w * of for w, of in zip(weights, plain[1:], strict=True)
    )
    torch.testing.assert_close(terms.total, total, rtol=rtol, atol=0)
    found, expected = (torch.autograd.grad(of, chunked.leaves(student)) for of in (terms.total, total))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=10 * rtol, atol=1e-12)


@every
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks_of_rows(settings, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    student, teacher = chunked.signals()
    vocabulary = relations.vocabulary(*chunked.SIZES)
    # 15 of 31 tokens are shared: the weight by default
    method = chunked.build("gold", vocabulary=vocabulary, **settings)
    assert len(vocabulary.shared) == 15
    plain = _plain(method, student, teacher, vocabulary)
    _compare(method, method(student, teacher, chunked.step()), student, plain)


@pytest.mark.parametrize("name", ["published observed", "published bayesian"])
def test_where_no_probability_is_tiny_the_numbers_are_the_published_ones(name):
    """The published code cuts probabilities and factors off at 1e-8, ours not at all."""
    student, teacher = chunked.signals(scale=0.1)
    vocabulary = relations.vocabulary(*chunked.SIZES)
    method = chunked.build("gold", vocabulary=vocabulary, **SETTINGS[name])
    plain = _plain(method, student, teacher, vocabulary, floor=FLOOR)
    _compare(method, method(student, teacher, chunked.step()), student, plain)


def test_tiny_probabilities_differ_by_what_the_floor_adds():
    """Sharper models: the published sums change by no more than the floor's share, but its gradients of tokens below it are gone."""
    student, teacher = chunked.signals(scale=4.0)
    vocabulary = relations.vocabulary(*chunked.SIZES)
    method = chunked.build("gold", vocabulary=vocabulary, merge="bayesian")
    _, exact, _ = _plain(method, student, teacher, vocabulary)
    _, floored, _ = _plain(method, student, teacher, vocabulary, floor=FLOOR)
    terms = method(student, teacher, chunked.step())
    torch.testing.assert_close(terms.sums["matched"], exact.detach(), rtol=1e-11, atol=0)
    assert 0 < (floored - exact).abs() < 1e-3 * exact
    of_exact, of_floored = (torch.autograd.grad(of, student.rows.hidden)[0] for of in (exact, floored))
    assert not torch.equal(of_exact, of_floored)


@every
def test_gradient_by_finite_differences(settings):
    student, teacher = chunked.signals()
    method = chunked.build("gold", **settings)

    def total(hidden, weight):
        changed = replace(student, rows=replace(student.rows, hidden=hidden), head=replace(student.head, weight=weight))
        return method(changed, teacher, chunked.step()).total

    assert torch.autograd.gradcheck(total, chunked.leaves(student))


def _same_vocabulary(size):
    same = torch.arange(size)
    return Vocabulary(same, torch.zeros(size), torch.stack([same, same], 1), same == 0, same == 0)


def test_with_one_tokenizer_it_is_the_js_divergence_of_all_tokens():
    student, teacher, step = chunked.same_tokens()
    method = chunked.build("gold", (23, 23), _same_vocabulary(23), skip_end=False)
    terms = method(student, teacher, step)
    plain = js_divergence(chunked.logits(student)[:, :23], chunked.logits(teacher)[:, :23]).sum()
    torch.testing.assert_close(terms.sums["matched"], plain.detach(), rtol=1e-12, atol=0)
    assert terms.sums["unmatched"] == 0
    torch.testing.assert_close(terms.total, plain, rtol=1e-12, atol=0)
    assert terms.diagnostics["aligned"] == 8


@pytest.mark.parametrize("settings", [{}, {"merge": "bayesian", "skip_end": False}, {"rows": "input"}])
def test_nothing_where_student_and_teacher_agree(settings):
    """On chunks of several rows too."""
    sequences = (((1, 1), (3, 3), (2, 2), (1, 1)),)
    student, _ = chunked.signals(sequences, sizes=(23, 23))
    teacher = replace(
        student, rows=replace(student.rows, hidden=student.rows.hidden.detach()), head=student.head.detach()
    )
    method = chunked.build("gold", (23, 23), _same_vocabulary(23), **settings)
    terms = method(student, teacher, chunked.step(sequences))
    assert terms.sums["matched"].abs() < 1e-13
    for gradient in torch.autograd.grad(terms.total, chunked.leaves(student)):
        assert gradient.abs().max() < 1e-12


def test_the_product_of_a_chunk_carries_its_gradient():
    """Half of a chunk of two rows enters as one probability alone; the gradient reaches its state too."""
    sequences = (((2, 1), (1, 1)),)
    student, teacher = chunked.signals(sequences)
    terms = chunked.build("gold")(student, teacher, chunked.step(sequences))
    (gradient,) = torch.autograd.grad(terms.total, student.rows.hidden)
    assert (gradient[:2].abs().sum(-1) > 0).all()
    assert not gradient[2].any()  # the end of text is left out, and the cross entropy has no weight


@every
@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_finite_for_extreme_probabilities_in_float32(settings, scale):
    student, teacher = chunked.signals(scale=scale, dtype=torch.float32)
    terms = chunked.build("gold", **settings)(student, teacher, chunked.step())
    assert all(value.isfinite() for value in (terms.sums | terms.diagnostics).values())
    for gradient in torch.autograd.grad(terms.total, chunked.leaves(student)):
        assert gradient.isfinite().all()


def test_responses_of_one_token_leave_only_the_cross_entropy():
    sequences = (((1, 1),), ((1, 1),))
    student, teacher = chunked.signals(sequences)
    for settings in ({"ce_rate": 1.0}, {"ce_rate": 1.0, "rows": "input"}):
        terms = chunked.build("gold", **settings)(student, teacher, chunked.step(sequences))
        assert terms.sums["matched"] == terms.sums["unmatched"] == 0
        torch.testing.assert_close(terms.total.detach(), terms.sums["ce"])
        assert torch.autograd.grad(terms.total, student.rows.hidden)[0].any()
    terms = chunked.build("gold", skip_end=False)(student, teacher, chunked.step(sequences))
    assert terms.sums["matched"] > 0


def test_rows_that_are_alone_on_both_sides_are_counted():
    student, teacher = chunked.signals()
    assert chunked.build("gold")(student, teacher, chunked.step()).diagnostics == {"aligned": torch.tensor(6)}


def test_needs():
    assert Gold.needs(Gold.Settings()) == Needs(teacher="signal", chunks=True, vocabulary=True)


def test_it_insists_on_what_it_asked_for():
    student, teacher = chunked.signals()
    with pytest.raises(ValueError, match="chunks"):
        chunked.build("gold")(student, teacher, Step())
    with pytest.raises(ValueError, match="vocabularies"):
        Gold(Gold.Settings(), Shape(5, 5, 23), Shape(6, 6, 31))


def test_the_vocabulary_is_no_part_of_a_checkpoint():
    assert chunked.build("gold").state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"matched_weight": 0.5}, "or neither"),
        ({"rows": "input", "skip_end": False}, "no row has read the end of text"),
        ({"beta": 1.1}, "less than or equal to 1"),
        ({"merge": "mean"}, "observed"),
        ({"student_temperature": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        Gold.Settings(**settings)
