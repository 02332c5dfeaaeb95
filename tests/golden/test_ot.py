"""Optimal transport against the published code, through settings of the same functions that the methods use."""

import pytest
import torch

from kdbench.losses.multilevel_ot import log_loss, transport_cost
from kdbench.losses.ot import PUBLISHED_ETP, PUBLISHED_SEQUENCE, cost_weights, sinkhorn
from kdbench.losses.semi_dual import PUBLISHED_SEMI_DUAL, PotentialNetwork, ascend, semi_dual
from tests.golden import golden

SEQUENCE_SCALE = 0.001  # of the published distance of a sequence
SEMI_DUAL_FACTOR = 10  # on the tolerances: the published float32 numbers are that much further from the float64 ones
ECOS_TOLERANCE = 2e-6  # of the published quadratic programme
MODULES = {"context": "context_proj", "token": "token_proj", "combine": "combine"}

etp = pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("etp_sinkhorn"))


def _sizes(cost):
    return torch.tensor([cost.shape[0]]), torch.tensor([cost.shape[1]])


def _arrays(group, case):
    """Full published arrays of a case."""
    return next(outputs for found, _, outputs in golden.loader().cases(group) if found["name"] == case["name"])


def _etp_settings(case, **settings):
    params = case["params"]
    return PUBLISHED_ETP | {
        "epsilon": 1 / params["sinkhorn_alpha"],
        "iterations": params["OT_max_iter"],
        "tolerance": params["stopThr"],
        "floor": params["epsilon"],
        **settings,
    }


@etp
def test_etp(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    cost = golden.leaf(inputs["cost"], precision)
    found = sinkhorn(cost[None], *_sizes(cost), **_etp_settings(case))
    golden.assert_loss(found.value, want["loss"], precision)
    assert set(want["components"]) == {"plan_sum"}
    golden.assert_loss(found.plan.sum(), want["components"]["plan_sum"], precision)
    assert set(want["grads"]) == {"cost"}
    found.value.sum().backward()
    golden.assert_gradient(cost.grad, want["grads"]["cost"], precision)
    tolerance = golden.GRADIENT_TOLERANCE[precision]
    for name, got in {"plan": found.plan[0], "grad/cost": cost.grad}.items():
        published = torch.tensor(_arrays("etp_sinkhorn", case)[f"as_published_code/f64/{name}"])
        torch.testing.assert_close(got.double(), published, rtol=0, atol=tolerance * published.abs().sum().item())


@etp
def test_etp_departs_by_its_floor_and_by_its_gradient(case, inputs, precision):
    """Without the constant in the divisions the plan has mass 1; with the plan constant the gradient is the plan."""
    cost = golden.leaf(inputs["cost"], precision)
    found = sinkhorn(cost[None], *_sizes(cost), **_etp_settings(case, floor=0.0, unrolled=False))
    assert found.plan.sum().item() == pytest.approx(1, abs=1e-14 if precision == "f64" else 1e-6)
    (gradient,) = torch.autograd.grad(found.value, cost)
    torch.testing.assert_close(gradient, found.plan[0], rtol=0, atol=0)
    # The floor is of the order of 1e-9 of the sums that it is added to, which are at least exp(-α max C) times a mass.
    floor, alpha = case["params"]["epsilon"], case["params"]["sinkhorn_alpha"]
    bound = 2 * floor * max(cost.shape) * (alpha * cost.max().item() + 1) * torch.exp(alpha * cost.max()).item()
    published = case["expected"]["as_published_code"]["f64"]["loss"]
    assert found.value.item() == pytest.approx(published, rel=bound + golden.LOSS_TOLERANCE[precision])


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("sequence_sinkhorn"))
def test_sequence_sinkhorn(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    params = case["params"]
    x, y = golden.leaf(inputs["x"], precision), golden.leaf(inputs["y"], precision).detach()
    cost = transport_cost((x / params["T"]).softmax(-1), (y / params["T"]).softmax(-1))
    counts = [torch.full((len(cost),), size) for size in cost.shape[1:]]
    settings = PUBLISHED_SEQUENCE | {"epsilon": params["epsilon"], "iterations": params["n_iters"]}
    found = sinkhorn(cost, *counts, **settings)
    assert found.iterations.tolist() == [params["n_iters"]] * len(cost)
    loss = SEQUENCE_SCALE * found.value.sum()
    golden.assert_loss(loss, want["loss"], precision)
    assert set(want["components"]) == {"KL_wo"}
    golden.assert_loss(log_loss(x.log_softmax(-1), y.softmax(-1)).mean(), want["components"]["KL_wo"], precision)
    assert set(want["grads"]) == {"x"}
    loss.backward()
    golden.assert_gradient(x.grad, want["grads"]["x"], precision)


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("semidual_ot"))
def test_semi_dual(case, inputs, precision):
    want = case["expected"]["as_published_code"]["f64"]
    params = case["params"]
    x = golden.leaf(inputs["x"], precision)
    names = sorted(name for name in inputs if name.startswith("C"))
    costs = {name: golden.leaf(inputs[name], precision) for name in names}
    counts = _sizes(costs[names[0]])

    def published(name, shape):
        return golden.formula().formula_array(params["phi_seed"], name, tuple(shape), params["phi_scale"])

    beta = golden.leaf(published("beta", [len(names)]), precision)
    network = PotentialNetwork(x.shape[1], params["hidden_dim"]).to(x.dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            module, kind = name.split(".")
            parameter.copy_(torch.tensor(published(f"phi.{MODULES[module]}.{kind}", parameter.shape)))

    def run():
        potential = network(x[None], counts[0])
        batched = [cost[None] for cost in costs.values()]
        settings = PUBLISHED_SEMI_DUAL | {"epsilon": params["epsilon"]}
        return semi_dual(batched, beta.softmax(0), potential, *counts, **settings)

    if params["train_mode"]:
        ascend(network, lambda: run().value.sum(), params["inner_iters"], params["inner_lr"])
    found = run()
    loss, absolute = SEMI_DUAL_FACTOR * golden.LOSS_TOLERANCE[precision], golden.ABSOLUTE[precision]
    assert found.value.item() == pytest.approx(want["loss"], rel=loss, abs=absolute)
    assert set(want["components"]) == {f"W_{k + 1}" for k in range(len(names))}
    for k, value in enumerate(found.per_cost[:, 0].tolist()):
        assert value == pytest.approx(want["components"][f"W_{k + 1}"], rel=loss, abs=absolute)
    leaves = {"x": x, "beta": beta} | costs
    assert set(want["grads"]) == set(leaves)
    gradients = torch.autograd.grad(found.value.sum(), list(leaves.values()))
    loader, tolerance = golden.loader(), SEMI_DUAL_FACTOR * golden.GRADIENT_TOLERANCE[precision]
    for (name, checksum), gradient in zip(((name, want["grads"][name]) for name in leaves), gradients, strict=True):
        assert loader.close_checksum(loader.checksum(gradient.numpy()), checksum, tolerance, absolute), name
    arrays = _arrays("semidual_ot", case)
    after = torch.tensor(arrays["as_published_code/f64/phi_token_proj_weight_after"])
    torch.testing.assert_close(network.token.weight.detach().double(), after, rtol=0, atol=10 * absolute)


@pytest.mark.parametrize(("case", "inputs", "precision"), golden.parameters("cost_weight_update"))
def test_cost_weights(case, inputs, precision):
    """The closed form is given in float64; the published solver's answer in float32 and to its own tolerance."""
    arrays, params = _arrays("cost_weight_update", case), case["params"]
    for family in ("logits", "hidden"):
        costs = golden.leaf(inputs[f"cost_values_{family}"], precision).detach()
        weights = cost_weights(costs, params["sigma"], params["lower_bound"]).double()
        exact, solver = (
            torch.tensor(arrays[name]).double()
            for name in (f"closed_form/f64/weights_{family}", f"as_published_code/f32/weights_{family}")
        )
        torch.testing.assert_close(weights, exact, rtol=golden.LOSS_TOLERANCE[precision], atol=1e-12)
        assert (weights - solver).abs().max() < ECOS_TOLERANCE
