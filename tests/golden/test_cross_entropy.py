"""Fine-tuning against the published cross entropy."""

import pytest
import torch

from kdbench.losses.cross_entropy import correct
from kdbench.methods.sft import Sft
from kdbench.signals import Step
from tests.golden import golden


# Published losses that are not ours, and why: kdbench has no label smoothing, whose published form counts the summed cross entropy
# once for every valid token. The summed cross entropy itself, logged as nll_loss, must agree.
def _smoothed(case) -> bool:
    return case["params"].get("label_smoothing", 0.0) > 0


SMOOTHED = [of for of in golden.parameters("cross_entropy") if of.values[0] is None or _smoothed(of.values[0])]


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("cross_entropy"))
def test_sft(case, inputs, precision):
    logits = golden.leaf(inputs["student_logits"], precision)
    student = golden.of_logits(inputs["label"], logits)
    terms = Sft(Sft.Settings(), None, None)(student, None, Step())
    terms.total.backward()
    for variant, by_precision in case["expected"].items():
        want = by_precision["f64"]
        golden.assert_loss(terms.sums["ce"], want["components"]["nll_loss"], precision)
        if not _smoothed(case):
            golden.assert_loss(terms.total, want["loss"], precision)
            golden.assert_gradient(logits.grad, want["grads"]["student_logits"], precision)
        if variant == "as_published_code":
            assert correct(student.rows.hidden, student.rows.targets).sum().item() == want["components"]["accuracy"]


@pytest.mark.parametrize(("case", "inputs", "precision"), [of for of in SMOOTHED if of.values[2] != "f32"])
def test_published_label_smoothing_departs_by_its_double_sum(case, inputs, precision):
    """Published minus corrected is what counting the sum n times instead of once adds."""
    epsilon, size = case["params"]["label_smoothing"], inputs["student_logits"].shape[-1]
    n = int((torch.tensor(inputs["label"]) != golden.IGNORED).sum())
    want = {variant: float(case["expected"][variant]["f64"]["loss"]) for variant in ("as_published_code", "corrected")}
    nll = float(case["expected"]["corrected"]["f64"]["components"]["nll_loss"])
    added = (1 - epsilon - epsilon / (size - 1)) * (n - 1) * nll
    assert want["as_published_code"] - want["corrected"] == pytest.approx(added, rel=1e-9)
