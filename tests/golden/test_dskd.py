"""dskd against the published criterion.

The golden logits are not head @ hidden: the published criterion was given both. A method computes logits from hidden states, so a state
here is [logits, hidden] under the head [I, 0], and the projectors read and write the parts that make the same numbers of it. They are
linear in the published projectors, so autograd carries the gradients over to these.
"""

import pytest
import torch
from torch.func import functional_call

from kdbench.losses.cross_entropy import correct
from kdbench.methods.base import Shape
from kdbench.methods.dskd import Dskd
from kdbench.signals import Head, Signal, Step
from tests.golden import golden

COMPONENTS = {"nll_loss": "ce", "t2s_ce_loss": "t2s_ce", "t2s_kd_loss": "t2s_kd", "s2t_kd_loss": "s2t_kd"}
LEAVES = ["student_logits", "student_hidden", "proj_t2s_weight", "proj_t2s_bias", "proj_s2t_weight", "proj_s2t_bias"]


def _signal(label, logits, hidden):
    size, width = logits.shape[-1], hidden.shape[-1]
    weight = torch.cat([torch.eye(size), torch.zeros(size, width)], dim=1).to(logits.dtype)
    return Signal(golden.rows(label, torch.cat([logits, hidden], dim=-1)), Head(weight, size), embed=None)


def _projector(weight, bias, output_head, input_logits):
    """The published projector, followed by a head, between the augmented states."""
    weight = output_head @ torch.cat([weight.new_zeros(weight.shape[0], input_logits), weight], dim=1)
    bias = output_head @ bias
    width = output_head.shape[1]
    return torch.cat([weight, weight.new_zeros(width, weight.shape[1])]), torch.cat([bias, bias.new_zeros(width)])


def _run(case, inputs, precision, ce_rate, kd_rate):
    params = case["params"]
    leaves = {name: golden.leaf(inputs[name], precision) for name in LEAVES}
    fixed = {name: golden.leaf(array, precision).detach() for name, array in inputs.items() if array.dtype.kind == "f"}
    student = _signal(inputs["label"], leaves["student_logits"], leaves["student_hidden"])
    teacher = _signal(inputs["teacher_label"], fixed["teacher_logits"], fixed["teacher_hidden"])
    size = student.head.size
    t2s = _projector(leaves["proj_t2s_weight"], leaves["proj_t2s_bias"], fixed["student_lm_head"], size)
    s2t = _projector(leaves["proj_s2t_weight"], leaves["proj_s2t_bias"], fixed["teacher_lm_head"], size)
    settings = Dskd.Settings(
        objective=params["kd_objective"], temperature=params["kd_temperature"], ce_rate=ce_rate, kd_rate=kd_rate
    )
    shapes = [Shape(signal.head.weight.shape[1], 1, size) for signal in (student, teacher)]
    weights = {"t2s.weight": t2s[0], "t2s.bias": t2s[1], "s2t.weight": s2t[0], "s2t.bias": s2t[1]}
    terms = functional_call(Dskd(settings, *shapes), weights, (student, teacher, Step()))
    gradients = torch.autograd.grad(terms.total, list(leaves.values()), allow_unused=True)
    return student, terms, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("dual_space_kd"))
def test_loss_components_and_gradients(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    rate = case["params"]["kd_rate"]
    student, terms, gradients = _run(case, inputs, precision, ce_rate=1 - rate, kd_rate=rate)
    golden.assert_loss(terms.total, want["loss"], precision)
    assert set(want["grads"]) == set(LEAVES)
    for name, checksum in want["grads"].items():
        golden.assert_gradient(gradients[name], checksum, precision)
    for published, ours in COMPONENTS.items():
        golden.assert_loss(terms.sums[ours], want["components"][published], precision)
    size = student.head.size
    assert correct(student.rows.hidden[:, :size], student.rows.targets).sum().item() == want["components"]["accuracy"]
    assert terms.diagnostics["t2s_correct"].item() == want["components"]["t2s_acc"]
    assert terms.diagnostics["s2t_correct"].item() == want["components"]["s2t_acc"]


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("dual_space_kd"))
def test_gradient_of_each_component(case, inputs, precision):
    """The three distillation terms train different tensors, so one run with kd_rate 1 tells them apart."""
    want = case["expected"]["as_published_code"]["f64"]["component_grads"]
    _, terms, gradients = _run(case, inputs, precision, ce_rate=0.0, kd_rate=1.0)
    golden.assert_loss(terms.total, case["expected"]["as_published_code"]["f64"]["components"]["kd_loss"], precision)
    tensors = []
    for component in ("t2s_ce_loss", "t2s_kd_loss", "s2t_kd_loss", "kd_loss"):
        for name, checksum in want[component].items():
            golden.assert_gradient(gradients[name], checksum, precision)
            tensors.append(name)
    assert sorted(tensors) == sorted(2 * LEAVES)
    _, _, gradients = _run(case, inputs, precision, ce_rate=1.0, kd_rate=0.0)
    golden.assert_gradient(gradients["student_logits"], want["nll_loss"]["student_logits"], precision)
