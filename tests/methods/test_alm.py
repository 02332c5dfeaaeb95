"""alm against its formula, written as loops over chunks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kdbench.losses import alm
from kdbench.methods.alm import Alm
from kdbench.methods.base import Needs, Shape
from kdbench.signals import Step, Vocabulary
from tests.methods import chunked

SETTINGS = {
    "published": {},
    "plain": {"debias": False},
    "low temperature": {"temperature": 2.0, "debias": False, "ce_rate": 0.3, "kd_rate": 1.7},
    "reverse": {"objective": "reverse_kl", "temperature": 5.0, "threshold": 0.45},
    "variation": {"objective": "total_variation", "threshold": 0.0},
    "limit": {"objective": "forward_kl_limit", "threshold": 0.6},
    "variation limit": {"objective": "total_variation_limit", "debias": False},
}
every = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def _divergence(settings, log_q, log_p):
    if settings.objective in alm.LIMITS:
        return alm.LIMITS[settings.objective](log_q, log_p)
    return alm.OBJECTIVES[settings.objective](log_q, log_p, settings.temperature)


def _plain(method, student, teacher, sequences=chunked.SEQUENCES):
    """Cross entropy, and for each sequence its rows times the mean over its chunks."""
    settings = method.settings
    z_s, z_t = chunked.logits(student), chunked.logits(teacher)
    logs = [z[:, : signal.head.size].log_softmax(-1) for z, signal in ((z_s, student), (z_t, teacher))]
    targets = [signal.rows.targets for signal in (student, teacher)]
    losses, pending = {}, [0.0, 0.0]
    chunks = chunked.rows_of_chunks(sequences)
    for index, (sequence, *rows) in enumerate(chunks):
        here = [sum(log[row, y[row]] for row in of) for log, y, of in zip(logs, targets, rows, strict=True)]
        pending = [before + now for before, now in zip(pending, here, strict=True)]
        if settings.debias and index + 1 < len(chunks) and chunks[index + 1][0] == sequence:
            masks = method.student_begins, method.teacher_begins
            after = [log[of[-1] + 1, mask].exp().sum().log() for log, of, mask in zip(logs, rows, masks, strict=True)]
            if after[1].exp() <= settings.threshold:
                continue
            pending = [so_far + more for so_far, more in zip(pending, after, strict=True)]
        losses.setdefault(sequence, []).append(_divergence(settings, *pending))
        pending = [0.0, 0.0]
    counts = student.rows.counts
    kd = sum(counts[sequence] * torch.stack(of).mean() for sequence, of in losses.items())
    return F.cross_entropy(z_s, targets[0], reduction="sum"), kd, sum(map(len, losses.values()))


@every
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks_of_rows(settings, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    student, teacher = chunked.signals()
    method = chunked.build("alm", **settings)
    terms = method(student, teacher, chunked.step())
    ce, kd, _ = _plain(method, student, teacher)
    rates = method.settings
    torch.testing.assert_close(terms.sums["ce"], ce.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.sums["alm"], kd.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(terms.total, rates.ce_rate * ce + rates.kd_rate * kd, rtol=1e-12, atol=0)
    for rate, loss in (("ce_rate", ce), ("kd_rate", kd)):
        alone = chunked.build("alm", **settings | {"ce_rate": 0.0, "kd_rate": 0.0} | {rate: 1.0})
        found = torch.autograd.grad(alone(student, teacher, chunked.step()).total, chunked.leaves(student))
        for gradient, expected in zip(
            found, torch.autograd.grad(loss, chunked.leaves(student), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


def test_the_threshold_joins_chunks():
    student, teacher = chunked.signals()
    numbers = [
        _plain(chunked.build("alm", threshold=threshold), student, teacher)[2] for threshold in (0.0, 0.45, 0.999)
    ]
    assert numbers[0] == 11
    assert numbers[2] == len(chunked.SEQUENCES) < numbers[1] < numbers[0]


@every
def test_gradient_by_finite_differences(settings):
    student, teacher = chunked.signals()
    method = chunked.build("alm", **settings)

    def total(hidden, weight):
        changed = replace(student, rows=replace(student.rows, hidden=hidden), head=replace(student.head, weight=weight))
        return method(changed, teacher, chunked.step()).total

    assert torch.autograd.gradcheck(total, chunked.leaves(student))


@every
def test_nothing_where_student_and_teacher_agree(settings):
    student, _, step = chunked.same_tokens()
    teacher = replace(
        student, rows=replace(student.rows, hidden=student.rows.hidden.detach()), head=student.head.detach()
    )
    same = torch.arange(23)
    begins = same % 2 == 0
    vocabulary = Vocabulary(same, torch.zeros(23), torch.stack([same, same], 1), begins, begins)
    method = chunked.build("alm", (23, 23), vocabulary, **settings | {"ce_rate": 0.0})
    terms = method(student, teacher, step)
    assert terms.sums["alm"].abs() < 1e-13
    for gradient in torch.autograd.grad(terms.total, chunked.leaves(student)):
        assert gradient.abs().max() < 1e-8


def test_with_one_tokenizer_it_is_the_divergence_of_each_target_alone():
    student, teacher, step = chunked.same_tokens()
    terms = chunked.build("alm", (23, 23), debias=False)(student, teacher, step)
    rows = torch.arange(8), student.rows.targets
    q, p = (chunked.logits(signal)[:, :23].softmax(-1)[rows] ** 0.01 for signal in (student, teacher))
    plain = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(terms.sums["alm"], plain.sum().detach(), rtol=1e-10, atol=0)
    assert terms.diagnostics["aligned"] == 8


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
@every
def test_finite_for_extreme_probabilities_in_float32(settings, scale):
    student, teacher = chunked.signals(scale=scale, dtype=torch.float32)
    terms = chunked.build("alm", **settings)(student, teacher, chunked.step())
    assert all(value.isfinite() for value in (terms.sums | terms.diagnostics).values())
    for gradient in torch.autograd.grad(terms.total, chunked.leaves(student)):
        assert gradient.isfinite().all()


def test_responses_of_one_token():
    sequences = (((1, 1),), ((1, 1),), ((1, 1),))
    student, teacher = chunked.signals(sequences)
    method = chunked.build("alm")
    terms = method(student, teacher, chunked.step(sequences))
    torch.testing.assert_close(terms.sums["alm"], _plain(method, student, teacher, sequences)[1].detach())
    assert terms.sums["alm"] > 0


def test_a_sequence_counts_as_much_as_its_rows():
    """The same two chunks, once in a response of 2 and once of 4 rows: mean over chunks, times rows."""
    found = []
    for chunks in (((1, 1), (1, 1)), ((2, 1), (2, 1))):
        student, teacher = chunked.signals((chunks,))
        terms = chunked.build("alm", debias=False, objective="total_variation_limit")(
            student, teacher, chunked.step((chunks,))
        )
        differences = []
        for _, ours, theirs in chunked.rows_of_chunks((chunks,)):
            log_q, log_p = (
                chunked.logits(signal)[rows, : signal.head.size]
                .log_softmax(-1)[range(len(rows)), signal.rows.targets[rows]]
                .sum()
                for signal, rows in ((student, ours), (teacher, theirs))
            )
            differences.append((log_q - log_p).abs().item())
        found.append((terms.sums["alm"].item(), sum(differences) / 2))
    assert found[0][0] == pytest.approx(2 * found[0][1])
    assert found[1][0] == pytest.approx(4 * found[1][1])


def test_diagnostics():
    student, teacher = chunked.signals()
    terms = chunked.build("alm")(student, teacher, chunked.step())
    p = chunked.logits(teacher)[:, :31].softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    per_sequence = [
        of.mean() * n for of, n in zip(entropy.split(teacher.rows.counts.tolist()), student.rows.counts, strict=True)
    ]
    torch.testing.assert_close(terms.diagnostics["teacher_entropy"], sum(per_sequence))
    assert terms.diagnostics["aligned"] == 6
    assert terms.diagnostics.keys() == {"teacher_entropy", "aligned"}


def test_needs():
    assert Alm.needs(Alm.Settings()) == Needs(teacher="signal", chunks=True, vocabulary=True)
    assert Alm.needs(Alm.Settings(debias=False)) == Needs(teacher="signal", chunks=True)
    assert list(Alm(Alm.Settings(debias=False), Shape(5, 5, 23), Shape(6, 6, 31)).buffers()) == []


def test_it_insists_on_what_it_asked_for():
    student, teacher = chunked.signals()
    with pytest.raises(ValueError, match="chunks"):
        chunked.build("alm")(student, teacher, Step())
    with pytest.raises(ValueError, match="vocabularies"):
        Alm(Alm.Settings(), Shape(5, 5, 23), Shape(6, 6, 31))


def test_the_vocabulary_is_no_part_of_a_checkpoint():
    assert chunked.build("alm").state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "forward_kl_limit", "temperature": 5.0}, "`temperature` is set"),
        ({"debias": False, "threshold": 0.5}, "only debiasing reads it"),
        ({"threshold": 1.0}, "less than 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"objective": "js_divergence"}, "forward_kl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        Alm.Settings(**settings)
