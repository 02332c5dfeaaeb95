"""What the golden groups mcw_kd and mcw_kd_dual have in common: positions of text, their costs' ingredients, and the part of dskd_cma.

Published and not ours: prompts take part in the transport; position j of the student is mixed with position j of the teacher, with its
gradient; the lexical cost is 0 off two warping paths; deviations are over all positions, padding included.
"""

import pytest
import torch

from kdbench.alignment.spelling import lexical_costs
from kdbench.losses import mcw
from kdbench.losses.cross_entropy import correct
from kdbench.losses.sequences import pad
from tests.golden import golden
from tests.golden.test_dskd_cma import LEAVES, _Case

TEMPERATURE = 2.0  # of the transport between distributions
WINDOW = 4
START = 0.1  # of the teacher's share in the interpolation
OT = ["student_logits", "student_hidden", "proj_ot_weight", "proj_ot_bias", "salience_weight", "salience_bias"]


def given(case, inputs, precision):
    """The case as one of dskd_cma, every tensor in a precision, those that gradients are compared of as leaves; and the masks of text."""
    cma = _Case(case, inputs, precision, "as_published_code")
    tensors = {name: golden.leaf(array, precision) for name, array in inputs.items() if array.dtype.kind == "f"}
    for name in tensors.keys() - set(OT):
        tensors[name] = tensors[name].detach()
    text = [torch.tensor(inputs[name]).bool() for name in ("attention_mask", "teacher_attention_mask")]
    return cma, tensors | cma.leaves, text


def share(case) -> float:
    """Of the teacher, in the interpolation; the published step counts from 1."""
    return START + (1 - START) * min(case["params"]["step"] / case["params"]["total_iters"], 1.0)


def log_top(case, tensors, mixed=lambda student: student):
    """Log-probabilities over the top k of every position, (B, T, k), the teacher's mixed with the student of the same position."""
    k = case["params"]["top_k_vocab"]
    ours, theirs = (mcw.largest_logits(tensors[f"{side}_logits"], k) for side in ("student", "teacher"))
    everything = torch.arange(theirs[..., 0].numel())
    pairs = torch.stack([everything, everything], 1)
    theirs = mcw.interpolate(mixed(ours).flatten(0, 1), theirs.flatten(0, 1), pairs, share(case)).view_as(theirs)
    return [(logits / TEMPERATURE).log_softmax(-1) for logits in (ours, theirs)]


def sides(inputs, tensors, text, log_top, normalised=lambda states: states):
    """Every position of text of both models."""
    projected = tensors["teacher_hidden"] @ tensors["proj_ot_weight"].T + tensors["proj_ot_bias"]
    found = []
    for states, ids, log, valid in zip(
        (tensors["student_hidden"], projected), ("input_ids", "teacher_input_ids"), log_top, text, strict=True
    ):
        salience = (states @ tensors["salience_weight"].T + tensors["salience_bias"])[..., 0]
        counts = valid.sum(1)
        log, salience, states, ids = (
            pad(of[valid], counts) for of in (log, salience, normalised(states), torch.tensor(inputs[ids]))
        )
        found.append(mcw.Side(log, salience, mcw.window_means(states, counts, WINDOW), ids))
    return found


def lexical(case, inputs, text, published=True):
    """(B, N, M) float32, lexical costs of the tokens at positions of text, published or ours."""
    found = torch.zeros(len(text[0]), *(int(valid.sum(1).max()) for valid in text))
    for b in range(len(found)):
        tokens = [
            [case["params"][f"{side}_tokens"][i] for i in inputs[ids][b][valid[b].numpy()]]
            for side, ids, valid in zip(("student", "teacher"), ("input_ids", "teacher_input_ids"), text, strict=True)
        ]
        costs = lexical_costs(*tokens, published=published)
        found[b, : costs.shape[0], : costs.shape[1]] = torch.tensor(costs)
    return found


def cma_losses(cma):
    """The published components of dskd_cma with gradient, and the leaves that each trains; see test_dskd_cma.py."""
    to_student, to_teacher = (cma.terms(0.0, 1.0, learns=space).total for space in (0, 1))
    values = cma.terms(0.0, 1.0).sums
    reference, whole = cma.terms(1.0, 0.0).total, cma.terms(0.0, 1.0).total
    t2s = {f"proj_{name}_{part}" for name in ("t2s", "query") for part in ("weight", "bias")}
    s2t = {name for name in LEAVES if name.startswith(("proj_s2t", "proj_query"))} | {"student_hidden"}
    return {
        "nll_loss": (reference, reference, {"student_logits"}),
        "t2s_ce_loss": (values["t2s_ce"], to_student, t2s),
        "t2s_kd_loss": (values["t2s_kd"], to_student, {"student_logits"}),
        "s2t_kd_loss": (values["s2t_kd"], to_teacher, s2t),
        "max_t2s_prob": (cma.max_t2s_prob(), cma.max_t2s_prob(), t2s),
        "kd_loss": (whole, whole, set(LEAVES)),
    }


def assert_published(case, want, precision, cma, leaves, transports, total, factor=1):
    """Every component, its gradient, the total and its gradient.

    Args:
        case, want, precision: golden numbers of a variant in float64, and the precision of the run.
        cma: from `given`.
        leaves: everything that gradients are compared of, by the published name.
        transports: the two transport losses by their published name.
        total: the weighted sum of all losses.
        factor: on the tolerances.
    """
    components, names = want["components"], list(leaves)
    losses = cma_losses(cma) | {name: (loss, loss, set(leaves) & trained(name)) for name, loss in transports.items()}
    assert set(want["component_grads"]) == set(losses)
    for name, (value, loss, reached) in losses.items():
        assert_loss(value, components[name], precision, factor)
        assert set(want["component_grads"][name]) == reached, name
        gradients = dict(zip(names, gradients_of(loss, leaves), strict=True))
        for leaf, checksum in want["component_grads"][name].items():
            assert_gradient(gradients[leaf], checksum, precision, factor)
    assert_loss(total, want["loss"], precision, factor)
    assert_loss(total, components["loss"], precision, factor)
    assert set(want["grads"]) == set(leaves)
    for leaf, gradient in zip(names, gradients_of(total, leaves), strict=True):
        assert_gradient(gradient, want["grads"][leaf], precision, factor)
    rows, size = cma.student.rows, cma.student.head.size
    assert correct(rows.hidden[:, :size], rows.targets).sum().item() == components["accuracy"]
    assert cma.terms(0.0, 1.0).diagnostics["t2s_correct"].item() == components["t2s_acc"]
    batch = len(rows.targets) / len(cma.teacher.rows.targets)
    assert cma.s2t_correct() * batch == pytest.approx(components["s2t_acc"], rel=1e-6)


def trained(transport):
    """The leaves that a transport loss trains, besides the weights of its costs."""
    family = transport.removeprefix("ot_loss_")
    weights = {f"cost_weights_{family}", f"beta_{family}"}
    return weights | (set(OT) if family == "logits" else {"student_hidden", "proj_ot_weight", "proj_ot_bias"})


def gradients_of(loss, leaves):
    """0 where a loss does not reach a leaf."""
    tensors = list(leaves.values())
    return torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_loss(got, want, precision, factor):
    """As in golden.py, within a multiple of the tolerance."""
    tolerance = {"rel": factor * golden.LOSS_TOLERANCE[precision], "abs": factor * golden.ABSOLUTE[precision]}
    assert got.item() == pytest.approx(float(want), **tolerance)


def assert_gradient(got, want, precision, factor):
    """As in golden.py, within a multiple of the tolerance."""
    golden.assert_checksum(
        got, want, factor * golden.GRADIENT_TOLERANCE[precision], factor * golden.ABSOLUTE[precision]
    )
