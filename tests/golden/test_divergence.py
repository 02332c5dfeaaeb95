"""The divergences against the code of DSKD."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import OBJECTIVES, OPTIONS
from tests.golden import golden

# Where the published code yields NaN we depart from it on purpose: ours is the value of the corrected variant.
# Published value without its 1e-9 inside the logarithms; within the tolerances all the same, see the last test.
EPSILON_IN_PUBLISHED = 1e-9


def _inputs(case, inputs, precision):
    params = case["params"]
    student = golden.leaf(inputs["student_logits"], precision)
    teacher = torch.tensor(inputs["teacher_logits"], dtype=student.dtype)
    if params.get("use_tea_temp"):
        teacher = teacher / params["teacher_temperature"]
    valid = torch.tensor(inputs["label"]) != golden.IGNORED
    return student, teacher, valid


def _ours(case, student, teacher, valid):
    params = case["params"]
    values = {"skew_lambda": params["skew_lambda"], "adaptive_alpha": params["adaptive_kl_alpha"]}
    options = {name: values[name] for name in OPTIONS.get(params["kd_objective"], ())}
    return OBJECTIVES[params["kd_objective"]](student[valid], teacher[valid], params["kd_temperature"], **options).sum()


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("divergence"))
def test_loss_and_gradient(case, inputs, precision):
    student, teacher, valid = _inputs(case, inputs, precision)
    loss = _ours(case, student, teacher, valid)
    loss.backward()
    for variant, by_precision in case["expected"].items():
        want = by_precision["f64"]
        if variant == "as_published_code" and math.isnan(float(want["loss"])):
            assert "corrected" in case["expected"]
            continue
        golden.assert_loss(loss, want["loss"], precision)
        for name, checksum in want["grads"].items():
            assert name == "student_logits"
            golden.assert_gradient(student.grad, checksum, precision)
    assert student.grad.isfinite().all()
    if torch.equal(student, teacher):
        assert loss.item() == 0
        assert student.grad.abs().max() < golden.ABSOLUTE[precision]


def _js(case) -> bool:
    return case is None or case["params"]["kd_objective"] == "js_divergence"


@pytest.mark.parametrize(
    ("case", "inputs", "precision"),
    [of for of in golden.parameters("divergence") if _js(of.values[0]) and of.values[2] != "f32"],
)
def test_published_js_departs_by_its_epsilon(case, inputs, precision):
    """With 1e-9 inside the logarithms the formula is the published one to rounding, without it ours."""

    def plain(epsilon):
        temperature = case["params"]["kd_temperature"]
        q, p = (F.softmax(logits[valid] / temperature, -1) for logits in (student.detach(), teacher))
        log_p, log_q, log_m = ((x + epsilon).log() for x in (p, q, (p + q) / 2))
        return (0.5 * (p * (log_p - log_m)).sum() + 0.5 * (q * (log_q - log_m)).sum()).item()

    student, teacher, valid = _inputs(case, inputs, precision)
    published = case["expected"]["as_published_code"]["f64"]["loss"]
    assert plain(EPSILON_IN_PUBLISHED) == pytest.approx(published, rel=1e-14)
    assert plain(0.0) == pytest.approx(_ours(case, student, teacher, valid).item(), rel=1e-14)
