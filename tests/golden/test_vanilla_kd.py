"""vanilla_kd against the published criterion (group various_divergence)."""

import pytest

from kdbench.losses.cross_entropy import correct
from kdbench.methods.vanilla_kd import VanillaKd
from kdbench.signals import Step
from tests.golden import golden

COMPONENTS = {"nll_loss": "ce", "kd_loss": "kd"}
# Logged by the published code and no part of its loss; kdbench does not compute them.
NOT_OURS = {"target_logits", "non_target_logits", "teacher_target_logits", "teacher_non_target_logits"}


def _run(case, inputs, precision, **rates):
    params = case["params"]
    logits = golden.leaf(inputs["student_logits"], precision)
    student = golden.of_logits(inputs["label"], logits)
    teacher = golden.of_logits(inputs["teacher_label"], golden.leaf(inputs["teacher_logits"], precision).detach())
    settings = VanillaKd.Settings(objective=params["kd_objective"], temperature=params["kd_temperature"], **rates)
    terms = VanillaKd(settings, None, None)(student, teacher, Step())
    terms.total.backward()
    return student, terms, logits.grad


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("various_divergence"))
def test_loss_components_and_gradients(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    rate = case["params"]["kd_rate"]
    student, terms, gradient = _run(case, inputs, precision, ce_rate=1 - rate, kd_rate=rate)
    golden.assert_loss(terms.total, want["loss"], precision)
    golden.assert_gradient(gradient, want["grads"]["student_logits"], precision)
    assert correct(student.rows.hidden, student.rows.targets).sum().item() == want["components"]["accuracy"]
    assert set(want["components"]) - NOT_OURS == set(COMPONENTS) | {"loss", "accuracy"}
    for published, ours in COMPONENTS.items():
        golden.assert_loss(terms.sums[ours], want["components"][published], precision)
        alone = {"ce_rate": 0.0, "kd_rate": 0.0} | {f"{ours}_rate": 1.0}
        _, _, gradient = _run(case, inputs, precision, **alone)
        golden.assert_gradient(gradient, want["component_grads"][published]["student_logits"], precision)
