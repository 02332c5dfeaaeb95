"""uld against both published ports."""

import pytest
import torch

from kdbench.losses.cross_entropy import correct
from kdbench.methods.uld import Uld
from kdbench.signals import Rows, Step
from tests.golden import golden

COMPONENTS = {"nll_loss": "ce", "uld_loss": "uld"}
RATES = {"nll_loss": {"ce_rate": 1.0, "kd_rate": 0.0}, "uld_loss": {"ce_rate": 0.0, "kd_rate": 1.0}}


def pairs_by_index(student: Rows, teacher: Rows) -> torch.Tensor:
    """The k-th response token of a sequence with the teacher's k-th, as far as both go."""
    starts = [rows.counts.cumsum(0) - rows.counts for rows in (student, teacher)]
    shared = torch.minimum(student.counts, teacher.counts).tolist()
    return torch.cat(
        [torch.stack([start + torch.arange(n) for start in at], dim=1) for *at, n in zip(*starts, shared, strict=True)]
    )


def _run(case, inputs, precision, **rates):
    logits = golden.leaf(inputs["student_logits"], precision)
    student = golden.of_logits(inputs["label"], logits)
    teacher = golden.of_logits(inputs["teacher_label"], golden.leaf(inputs["teacher_logits"], precision).detach())
    step = Step(pairs=pairs_by_index(student.rows, teacher.rows))
    terms = Uld(Uld.Settings(**rates), None, None)(student, teacher, step)
    terms.total.backward()
    return student, terms, logits.grad


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("universal_logit_distillation"))
def test_loss_components_and_gradients(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    rate = case["params"]["kd_rate"]
    ce_rate = {"dskd": 1 - rate, "mcw": 1.0}[case["params"]["combine"]]
    student, terms, gradient = _run(case, inputs, precision, ce_rate=ce_rate, kd_rate=rate)
    golden.assert_loss(terms.total, want["loss"], precision)
    golden.assert_gradient(gradient, want["grads"]["student_logits"], precision)
    assert correct(student.rows.hidden, student.rows.targets).sum().item() == want["components"]["accuracy"]
    assert set(want["components"]) == set(COMPONENTS) | {"loss", "accuracy"}
    for published, ours in COMPONENTS.items():
        golden.assert_loss(terms.sums[ours], want["components"][published], precision)
        _, _, gradient = _run(case, inputs, precision, **RATES[published])
        golden.assert_gradient(gradient, want["component_grads"][published]["student_logits"], precision)
