"""mined against the published criterion (group min_edit_dis_kld).

In float32 and float64 the published code writes the teacher's moved logits through a detached view into the student's own, so its
divergence is 0. `corrected` makes the copy that was meant, as its bfloat16 does; that is what ours computes. The published code moves the
logits of the first token of a preimage: `preimage: first`.
"""

import math

import numpy as np
import pytest
import torch

from kdbench.alignment.spelling import edit_distances, one_to_one
from kdbench.losses.cross_entropy import correct
from kdbench.losses.mined import first_of_preimage, first_preimage, largest_of_preimage
from kdbench.methods.base import Shape
from kdbench.methods.mined import Mined
from kdbench.signals import Head, Signal, Step, Vocabulary
from tests.golden import golden

every = pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("min_edit_dis_kld"))
NO_TOKEN = -100_000  # the published logit of a token that no token of the teacher is mapped to


def _signal(inputs, side, logits):
    """A signal whose head is the identity."""
    size = logits.shape[-1]
    found = golden.rows(inputs[f"{side}label"], logits, inputs[f"{side}input_ids"])
    return Signal(found, Head(torch.eye(size, dtype=logits.dtype), size), embed=None)


def _pairs(case, student, teacher):
    """The student's rows with exactly one of the teacher's, from the published alignment."""
    starts = [(rows.counts.cumsum(0) - rows.counts).tolist() for rows in (student.rows, teacher.rows)]
    return torch.tensor(
        [
            (start + i, teacher_start + found[0])
            for start, teacher_start, record in zip(*starts, case["alignment"], strict=True)
            for i, found in enumerate(record["student_to_teacher"])
            if len(found) == 1
        ]
    )


def _vocabulary(inputs):
    """The published map of the tokens; the rest of a vocabulary is not read."""
    unread = torch.zeros(0, dtype=torch.long)
    return Vocabulary(torch.tensor(inputs["tea2stu"]).long(), unread, unread, unread, unread)


def _run(case, inputs, precision, round_to=None, **settings):
    """Signals, pairs, terms and the gradient of the student's logits."""
    params = case["params"]
    logits = golden.leaf(inputs["student_logits"], precision)
    teacher_logits = golden.leaf(inputs["teacher_logits"], precision).detach()
    given = [of if round_to is None else of.to(round_to).to(of.dtype) for of in (logits, teacher_logits)]
    student, teacher = (_signal(inputs, side, of) for side, of in zip(("", "teacher_"), given, strict=True))
    pairs = _pairs(case, student, teacher)
    rates = {"ce_rate": 1 - params["kd_rate"], "kd_rate": params["kd_rate"]}
    settings = {"objective": params["kd_objective"], "temperature": params["kd_temperature"]} | rates | settings
    method = Mined(
        Mined.Settings(**({"preimage": "first"} | settings)),
        *(Shape(1, 1, signal.head.size) for signal in (student, teacher)),
        _vocabulary(inputs),
    )
    terms = method(student, teacher, Step(pairs=pairs))
    terms.total.backward()
    return student, teacher, pairs, terms, logits.grad


@every
def test_loss_components_and_gradients(case, inputs, precision):
    want = case["expected"]["corrected"]["f64"]
    student, _, _, terms, gradient = _run(case, inputs, precision)
    golden.assert_loss(terms.total, want["loss"], precision)
    golden.assert_gradient(gradient, want["grads"]["student_logits"], precision)
    assert set(want["components"]) == {"nll_loss", "forward_kl", "loss", "accuracy"}
    golden.assert_loss(terms.sums["ce"], want["components"]["nll_loss"], precision)
    golden.assert_loss(terms.sums["kd"] + terms.sums["one_hot"], want["components"]["forward_kl"], precision)
    assert correct(student.rows.hidden, student.rows.targets).sum().item() == want["components"]["accuracy"]
    for component, rates in {"nll_loss": (1.0, 0.0), "forward_kl": (0.0, 1.0)}.items():
        *_, gradient = _run(case, inputs, precision, ce_rate=rates[0], kd_rate=rates[1])
        golden.assert_gradient(gradient, want["component_grads"][component]["student_logits"], precision)


def _targets_of_rows(case, inputs, precision):
    """What the published code takes for the teacher's logits at the student's rows, and which rows are aligned."""
    student, teacher, pairs, _, _ = _run(case, inputs, precision)
    nearest, size = _vocabulary(inputs).nearest, student.head.size
    moved = first_of_preimage(teacher.rows.hidden, first_preimage(nearest, size))
    matched = pairs[student.rows.inputs[pairs[:, 0]] == nearest[teacher.rows.inputs[pairs[:, 1]]]]
    targets = torch.full((len(student.rows.targets), size), float(NO_TOKEN), dtype=moved.dtype)
    targets[torch.arange(len(targets)), student.rows.targets] = 100.0
    targets[matched[:, 0]] = moved[matched[:, 1]].nan_to_num(neginf=NO_TOKEN)
    return student, targets, len(matched)


@every
def test_the_teacher_in_the_students_vocabulary(case, inputs, precision):
    stored = {name: outputs for of, _, outputs in golden.loader().cases("min_edit_dis_kld") for name in [of["name"]]}
    want = stored[case["name"]]["corrected/f64/aligned_teacher_logits"][np.asarray(inputs["label"]) != golden.IGNORED]
    _, targets, aligned = _targets_of_rows(case, inputs, precision)
    *_, terms, _ = _run(case, inputs, precision)
    assert 0 < aligned < len(want)
    assert terms.diagnostics["aligned"].item() == aligned
    np.testing.assert_allclose(targets.double().numpy(), want, rtol=golden.LOSS_TOLERANCE[precision])


@every
def test_departs_from_the_published_numbers_because_they_compare_the_student_with_itself(case, inputs, precision):
    """Its divergence is 0 without gradient, its loss cross entropy alone, its accuracy that of the logits written over the student's."""
    want = case["expected"]["as_published_code"]["f64"]
    student, targets, _ = _targets_of_rows(case, inputs, precision)
    *_, terms, _ = _run(case, inputs, precision)
    assert want["components"]["forward_kl"] == 0
    assert want["component_grads"]["forward_kl"]["student_logits"]["abs_sum"] < 1e-12
    golden.assert_loss((1 - case["params"]["kd_rate"]) * terms.sums["ce"], want["loss"], precision)
    assert terms.sums["kd"] + terms.sums["one_hot"] > 0
    assert correct(targets, student.rows.targets).sum().item() == want["components"]["accuracy"]


@every
def test_about_the_published_numbers_of_bfloat16(case, inputs, precision):
    """There the published divergence is the corrected one: of logits rounded to bfloat16, in float32."""
    want = case["expected"]["as_published_code_bf16"]
    (want,) = want.values()
    student, _, _, terms, _ = _run(case, inputs, precision, round_to=torch.bfloat16)
    # The published code divides by the temperature in bfloat16, which is exact for powers of two alone.
    relative = 1e-5 if math.log2(case["params"]["kd_temperature"]).is_integer() else 2**-7
    found = {"nll_loss": terms.sums["ce"], "forward_kl": terms.sums["kd"] + terms.sums["one_hot"], "loss": terms.total}
    for component, value in found.items():
        assert value.item() == pytest.approx(want["components"][component], rel=relative)
    assert correct(student.rows.hidden, student.rows.targets).sum().item() == want["components"]["accuracy"]


@every
def test_the_largest_of_a_preimage_is_never_less_than_its_first(case, inputs, precision):
    """What the default departs by: tokens with one nearest token, or none, keep their logit, the others can only gain."""
    logits = torch.tensor(inputs["teacher_logits"], dtype=golden.PRECISIONS[precision]).flatten(0, 1)
    nearest, size = _vocabulary(inputs).nearest, inputs["student_logits"].shape[-1]
    largest = largest_of_preimage(logits, nearest, size)
    first = first_of_preimage(logits, first_preimage(nearest, size))
    several = torch.bincount(nearest, minlength=size) > 1
    assert torch.equal(largest[:, ~several], first[:, ~several])
    assert (largest[:, several] >= first[:, several]).all()
    assert (largest[:, several] > first[:, several]).any()
    terms = [_run(case, inputs, precision, preimage=preimage)[3] for preimage in ("max", "first")]
    assert terms[0].sums["ce"] == terms[1].sums["ce"]
    assert terms[0].sums["one_hot"] == terms[1].sums["one_hot"]
    assert terms[0].sums["kd"] != terms[1].sums["kd"]


@every
def test_pairs_are_those_of_the_project(case, inputs, precision):
    """Dynamic time warping over the edit distances of the pieces without their markers, as the workflow computes it."""
    params = case["params"]
    for record in case["alignment"]:
        texts = [
            [piece.replace(params[f"{side}_marker"], "") for piece in record[f"{side}_tokens"]]
            for side in ("student", "teacher")
        ]
        want = [(i, found[0]) for i, found in enumerate(record["student_to_teacher"]) if len(found) == 1]
        assert one_to_one(edit_distances(*texts)).tolist() == [list(pair) for pair in want]
