"""mcw_kd against the published primal criterion, as a composition of the functions that the method uses (see mcw.py of this folder).

Besides, the published ε is 10 in units of the cost, gradients go through the iterations, and the weight of the hidden term is computed and
dropped (the variant `corrected` applies it). The last tests show what ours changes, and by how much.
"""

import pytest
import torch

from kdbench.losses import mcw
from kdbench.losses.ot import PUBLISHED_ETP, sinkhorn
from tests.golden import golden
from tests.golden.mcw import OT, assert_published, given, gradients_of, lexical, log_top, sides

every = pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("mcw_kd"))
WEIGHTS = {"logits": [0.2, 0.5, 0.3], "hidden": [0.3, 0.5, 0.2]}
CONSTANT = 1e-7  # added to the student's probabilities inside the logarithm
MEANS = {
    "logits": ["avg_c2_logits", "avg_c4_logits", "avg_c_salience_logits"],
    "hidden": ["avg_c2_last", "avg_c5_last", "avg_c6_last"],
}
ARRAYS = {
    "logits": ["cost_l2_logits", "cost_kl_logits", "cost_salience"],
    "hidden": ["cost_edit", "cost_context_l2", "cost_context_cos"],
}
FLOAT32 = 2**-23  # the published log keeps means of costs in float32


class Transports:
    """Costs, weights and transport losses of both families over all positions of text.

    Args:
        case: golden parameters.
        inputs: ids at all positions.
        tensors: logits and states at all positions, weights of the layers.
        text: masks of the positions of text.
        mixed: what the student's logits are in the interpolation.
        constant: added to probabilities in a logarithm.
        settings: of Sinkhorn that differ from the published ones.
    """

    def __init__(self, case, inputs, tensors, text, mixed=lambda student: student, constant=CONSTANT, **settings):
        self.counts = [valid.sum(1) for valid in text]
        ours, theirs = sides(inputs, tensors, text, log_top(case, tensors, mixed))
        spelling = lexical(case, inputs, text)
        self.costs = {
            "logits": [
                mcw.l2_costs(ours.log_top.exp(), theirs.log_top.exp()),
                mcw.kl_costs((ours.log_top.exp() + constant).log(), theirs.log_top),
                mcw.salience_costs(ours.salience, theirs.salience),
            ],
            "hidden": mcw.hidden_costs(ours, theirs, spelling, self.counts)[0],
        }
        # float32 also in the float64 run of the published code, and so is its product with a weight.
        self.costs["hidden"][0] = spelling
        dtype = tensors["student_logits"].dtype
        self.weights = {family: torch.tensor(of, dtype=dtype, requires_grad=True) for family, of in WEIGHTS.items()}
        self.transports = {}
        for family, of in self.costs.items():
            total = sum(weight * cost for weight, cost in zip(self.weights[family], of, strict=True))
            # The published rows are the teacher's positions, which its iterations update last.
            self.transports[family] = sinkhorn(total.mT, *self.counts[::-1], **(PUBLISHED_ETP | settings))

    def loss(self, family):
        return self.transports[family].value.mean()


class _Published(Transports):
    """Those of a golden case, with its part of dskd_cma and everything that gradients are compared of."""

    def __init__(self, case, inputs, precision, *arguments, **settings):
        self.cma, tensors, text = given(case, inputs, precision)
        super().__init__(case, inputs, tensors, text, *arguments, **settings)
        self.ot_leaves = {name: tensors[name] for name in OT}
        self.leaves = self.cma.leaves | self.ot_leaves
        self.leaves |= {f"cost_weights_{family}": of for family, of in self.weights.items()}


@every
def test_loss_components_and_gradients(case, inputs, precision):
    found = _Published(case, inputs, precision)
    for variant, by_precision in case["expected"].items():
        want = by_precision["f64"]
        weight = case["params"].get("ot_weight_hidden", 1.0) if variant == "corrected" else 1.0
        transports = {"ot_loss_logits": found.loss("logits"), "ot_loss_hidden": weight * found.loss("hidden")}
        total = found.cma.terms(1.0, case["params"]["kd_rate"]).total + sum(transports.values())
        assert_published(case, want, precision, found.cma, found.leaves, transports, total)
        assert want["components"]["loss_ce"] == want["components"]["nll_loss"]
        means = {
            name: mcw.mean_costs(cost, *found.counts)[-1].item()  # the published log is of the last sequence
            for family, names in MEANS.items()
            for name, cost in zip(names, found.costs[family], strict=True)
        }
        relative = max(FLOAT32, golden.LOSS_TOLERANCE[precision])
        assert means == {name: pytest.approx(want["components"][name], rel=relative) for name in means}
        compared = {*want["component_grads"], *means, "loss_ce", "loss", "accuracy", "t2s_acc", "s2t_acc"}
        assert set(want["components"]) == compared


@every
def test_every_cost_of_every_sequence(case, inputs, precision):
    found = _Published(case, inputs, precision)
    _, _, outputs = next(of for of in golden.loader().cases("mcw_kd") if of[0]["name"] == case["name"])
    compared = 0
    for family, names in ARRAYS.items():
        for name, cost in zip(names, found.costs[family], strict=True):
            for b in range(len(cost)):
                want = torch.tensor(outputs[f"as_published_code/f64/{name}_{b}"]).double()
                n, m = (int(counts[b]) for counts in found.counts)
                tolerance = 10 * golden.LOSS_TOLERANCE[precision]
                torch.testing.assert_close(cost[b, :n, :m].mT.double(), want, rtol=tolerance, atol=tolerance)
                compared += 1
    assert compared == 6 * len(inputs["label"])


@every
def test_the_student_as_a_constant_of_the_interpolation_changes_no_value(case, inputs, precision):
    """Only the gradient of the student's logits, by what flows into the teacher's side."""
    published, ours = (_Published(case, inputs, precision, mixed) for mixed in (lambda z: z, torch.Tensor.detach))
    assert torch.equal(published.loss("logits"), ours.loss("logits"))
    gradients = [gradients_of(of.loss("logits"), of.ot_leaves) for of in (published, ours)]
    same = [torch.equal(*of) for of in zip(*gradients, strict=True)]
    assert same == [name != "student_logits" for name in OT]


@every
def test_with_the_plan_held_fixed_the_gradient_is_the_plan(case, inputs, precision):
    found = _Published(case, inputs, precision, unrolled=False)
    for family, transport in found.transports.items():
        golden.assert_loss(
            found.loss(family),
            case["expected"]["as_published_code"]["f64"]["components"][f"ot_loss_{family}"],
            precision,
        )
        (gradient,) = gradients_of(found.loss(family), {"weights": found.leaves[f"cost_weights_{family}"]})
        paid = [(transport.plan * cost.mT).sum((1, 2)).mean() for cost in found.costs[family]]
        torch.testing.assert_close(gradient, torch.stack(paid).detach())


@every
def test_the_published_epsilon_gives_almost_the_independent_plan(case, inputs, precision):
    """ε = 10: the loss is the mean cost to some per cent; ε = 0.1 of the mean cost lets the plan follow the costs."""
    published = _Published(case, inputs, precision)
    ours = _Published(case, inputs, precision, epsilon=0.1, relative=True, iterations=500, unrolled=False)
    for family in WEIGHTS:
        weights = WEIGHTS[family]
        mean = sum(
            weight * mcw.mean_costs(cost, *published.counts).mean()
            for weight, cost in zip(weights, published.costs[family], strict=True)
        )
        assert published.loss(family) > 0.97 * mean
        assert ours.loss(family) < 0.9 * mean


@every
def test_the_constant_in_the_logarithm_lowers_the_divergences_alone(case, inputs, precision):
    """KL(p ‖ q) by less than 1e-7 Σ p / q; nothing else."""
    published, exact = (_Published(case, inputs, precision, constant=of) for of in (CONSTANT, 0.0))
    for name, one, other in zip(MEANS["logits"], published.costs["logits"], exact.costs["logits"], strict=True):
        assert torch.equal(one, other) == (name != "avg_c4_logits")
    gap = (exact.costs["logits"][1] - published.costs["logits"][1])[mcw.cells(exact.costs["logits"][1], *exact.counts)]
    assert gap.max() < 1e-5
    assert gap.min() > -golden.ABSOLUTE[precision]


@every
def test_the_lexical_cost_of_the_published_code_is_zero_off_the_paths(case, inputs, precision):
    """Almost all of the plan's mass may travel there at no cost; ours is 0 for equal tokens and positive for all others."""
    _, _, text = given(case, inputs, precision)
    published, ours = (lexical(case, inputs, text, published=of) for of in (True, False))
    cells = mcw.cells(ours, *(valid.sum(1) for valid in text))
    assert (published[cells] == 0).double().mean() > 0.95
    assert (ours[cells] == 0).double().mean() < 0.1
    assert ours.max() <= 1
    assert published.max() > 1
