"""The published semi-dual criterion of mcw_kd, as a composition of the functions that the method uses (see mcw.py of this folder).

Besides, its potential is a network that takes a few clipped steps on one sequence after the other, and β is never trained. Ours are the
exact potentials, and the last test shows how far the published ones are from them.
"""

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses import mcw
from kdbench.losses.semi_dual import PUBLISHED_SEMI_DUAL, PotentialNetwork, ascend, semi_dual, semi_dual_potentials
from tests.golden import golden
from tests.golden.mcw import OT, assert_gradient, assert_loss, assert_published, given, lexical, log_top, sides

every = pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("mcw_kd_dual"))
FACTOR = 10  # on the tolerances: the published float32 numbers are that much further from the float64 ones
CE_RATE, OT_RATE = 0.5, 10.0
LEAST, MOST = 1e-7, 100.0  # the published bounds of probabilities and divergences
LONG = 1e9  # cosines of vectors so long that the constant beside their norm is nothing; the published bound is no sum
MODULES = {"context": "context_proj", "token": "token_proj", "combine": "combine"}
FLOAT32 = 2**-23  # the published log keeps W in float32


class _Published:
    """Costs, potentials, values and the leaves that they came from."""

    def __init__(self, case, inputs, precision):
        self.params, self.precision = case["params"], precision
        self.cma, tensors, text = given(case, inputs, precision)
        self.counts = [valid.sum(1) for valid in text]
        ours, theirs = sides(inputs, tensors, text, log_top(case, tensors), lambda states: F.normalize(states, dim=-1))
        q, p = (side.log_top.exp().clamp(LEAST, 1.0) for side in (ours, theirs))
        context = [ours.context, theirs.context]
        costs = {
            "logits": [
                self._in_largest(mcw.l2_costs(q, p)),
                self._in_largest(mcw.kl_costs(q.log(), p.log()).clamp(0.0, MOST)),
                self._in_largest(mcw.salience_costs(ours.salience, theirs.salience)),
            ],
            "hidden": [
                self._in_largest(lexical(case, inputs, text).to(q.dtype)),
                self._in_largest(mcw.l2_costs(*context)),
                mcw.cosine_costs(*(LONG * of for of in context)).clamp(0.0, 2.0),
            ],
        }
        self.costs = {family: [cost.mT for cost in of] for family, of in costs.items()}
        projected = tensors["teacher_hidden"] @ tensors["proj_ot_weight"].T + tensors["proj_ot_bias"]
        valid = text[1]
        self.inputs = {
            "logits": [p[b, : int(m)] for b, m in enumerate(self.counts[1])],
            "hidden": [F.normalize(of[real], dim=-1) for of, real in zip(projected, valid, strict=True)],
        }
        self.beta = {family: self._beta(number) for number, family in enumerate(self.costs)}
        self.leaves = self.cma.leaves | {name: tensors[name] for name in OT}
        self.leaves |= {f"beta_{family}": of for family, of in self.beta.items()}

    def _in_largest(self, cost):
        return mcw.in_units_of(cost, mcw.largest(cost, *self.counts))

    def _formula(self, number, name, shape):
        return golden.formula().formula_array(
            self.params["phi_seed"] + number, name, tuple(shape), self.params["phi_scale"]
        )

    def _beta(self, number):
        return golden.leaf(self._formula(number, "beta", [3]), self.precision)

    def _network(self, number, width):
        network = PotentialNetwork(width).to(golden.PRECISIONS[self.precision])
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                module, kind = name.split(".")
                parameter.copy_(torch.tensor(self._formula(number, f"phi.{MODULES[module]}.{kind}", parameter.shape)))
        return network

    def sequence(self, family, b):
        """Costs (3, 1, M, N) and the counts of a sequence."""
        n, m = (of[b : b + 1] for of in self.counts)
        return torch.stack(self.costs[family])[:, b : b + 1, : int(m), : int(n)], m, n

    def values(self, family):
        """L (B,) and W_k (3, B), one sequence after the other."""
        number = list(self.costs).index(family)
        states = self.inputs[family]
        network = self._network(number, states[0].shape[1])
        found = []
        for b, of in enumerate(states):
            costs, m, n = self.sequence(family, b)

            def run(of=of, costs=costs, m=m, n=n):
                settings = PUBLISHED_SEMI_DUAL | {"epsilon": self.params["ot_epsilon"]}
                return semi_dual(costs, self.beta[family].softmax(0), network(of[None], m), m, n, **settings)

            if self.params["train_mode"]:
                ascend(
                    network,
                    lambda run=run: run().value.sum(),
                    self.params["ot_inner_iters"],
                    self.params["ot_inner_lr"],
                )
            found.append(run())
        return torch.cat([of.value for of in found]), torch.cat([of.per_cost for of in found], 1)


@every
def test_loss_components_and_gradients(case, inputs, precision):
    found = _Published(case, inputs, precision)
    values = {family: found.values(family) for family in found.costs}
    transports = {f"ot_loss_{family}": value.mean() for family, (value, _) in values.items()}
    total = found.cma.terms(CE_RATE, case["params"]["kd_rate"]).total + OT_RATE * sum(transports.values())
    per_cost = {
        f"W_{k + 1}_{family}": of.mean().item()
        for family, (_, costs) in values.items()
        for k, of in enumerate(costs.detach())
    }
    for by_precision in case["expected"].values():
        want = by_precision["f64"]
        assert_published(case, want, precision, found.cma, found.leaves, transports, total, FACTOR)
        relative = max(FLOAT32, FACTOR * golden.LOSS_TOLERANCE[precision])
        assert per_cost == {name: pytest.approx(want["components"][name], rel=relative) for name in per_cost}
        compared = {*want["component_grads"], *per_cost, "loss_ce", "loss", "accuracy", "t2s_acc", "s2t_acc"}
        assert set(want["components"]) == compared
    for family, of in found.beta.items():
        _, _, outputs = next(of for of in golden.loader().cases("mcw_kd_dual") if of[0]["name"] == case["name"])
        alpha = torch.tensor(outputs[f"as_published_code/f64/alpha_{family}"]).double()
        torch.testing.assert_close(of.softmax(0).detach().double(), alpha, rtol=1e-6, atol=0)


@every
def test_the_exact_potential_is_higher(case, inputs, precision):
    """The network's value is a lower bound; after its few steps it is well below the maximum."""
    found = _Published(case, inputs, precision)
    for family in found.costs:
        published, _ = found.values(family)
        weights = found.beta[family].softmax(0).detach()
        for b, value in enumerate(published.tolist()):
            of = found.sequence(family, b)
            potentials = semi_dual_potentials(of[0], weights, *of[1:], epsilon=0.1, iterations=2000, tolerance=1e-6)
            exact = semi_dual(of[0], weights, potentials.row_potential, *of[1:], epsilon=potentials.epsilon).value
            assert exact.item() > value + 1e-3


@every
def test_beta_learns_in_the_direction_of_the_cheaper_cost(case, inputs, precision):
    """The published gradient of β exists, and no optimizer sees it."""
    found = _Published(case, inputs, precision)
    for family, beta in found.beta.items():
        value, per_cost = found.values(family)
        (gradient,) = torch.autograd.grad(value.mean(), beta)
        alpha, mean = beta.softmax(0), per_cost.mean(1)
        assert_gradient(
            gradient, golden.loader().checksum((alpha * (mean - alpha @ mean)).detach().numpy()), precision, 1
        )
        assert_loss(value.mean(), (alpha @ mean).item(), precision, 1)
