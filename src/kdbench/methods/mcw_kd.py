"""Multi-cost Wasserstein distillation: across tokenizers, by optimal transport between positions under several costs at once."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdbench.losses import mcw
from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.mcw import Side
from kdbench.losses.ot import cost_weights, sinkhorn, sinkhorn_divergence
from kdbench.losses.semi_dual import semi_dual, semi_dual_potentials
from kdbench.losses.sequences import pad
from kdbench.losses.vocabulary import logits_at, over_vocabulary
from kdbench.methods.base import Method, Needs, Shape, require, require_signal
from kdbench.methods.dskd_cma import DskdCma, DskdCmaSettings, Look
from kdbench.settings import Bool, Float, Int
from kdbench.signals import Head, Signal, Step, Terms, weighted

COSTS = {"logits": ("l2", "kl", "salience"), "hidden": ("lexical", "context", "cosine")}
_START = {"logits": [0.2, 0.5, 0.3], "hidden": [0.3, 0.5, 0.2]}  # published, for the solver sinkhorn
_Weights = Annotated[list[Annotated[Float, Field(ge=0)]], Field(min_length=3, max_length=3)] | None


class McwKdSettings(DskdCmaSettings):
    """Constants of the lab's scripts for GPT2 and Qwen1.5; those of dskd_cma hold for its part of the loss.

    `ce_rate`, `kd_rate`, `w_logits` and `w_hidden` are those of the older scripts (multicost), which are the only ones that define all
    four. See docs/methods.md for the constants of the other published scripts.
    """

    ce_rate: Annotated[Float, Field(ge=0)] = Field(
        10.0, description="weight of the cross entropy with the reference (older scripts; published code: 1)"
    )
    kd_rate: Annotated[Float, Field(ge=0)] = Field(
        2.5, description="weight of the terms of dskd_cma (older scripts; published: 5.0 for GPT2, 0.5 for TinyLLaMA)"
    )
    temperature: Annotated[Float, Field(gt=0)] = Field(
        3.0, description="divides the logits of both sides in the divergences of dskd_cma"
    )
    w_logits: Annotated[Float, Field(ge=0)] = Field(
        50.0,
        description="weight of the transport between output distributions (older scripts; published code: undefined)",
    )
    w_hidden: Annotated[Float, Field(ge=0)] = Field(
        10.0, description="weight of the transport between hidden states (older scripts; published code: undefined)"
    )
    anchor_rate: Annotated[Float, Field(ge=0)] = Field(
        0.0,
        description="weight of the cross entropy of projected teacher states at paired positions; published: no such term",
    )
    top_k: Annotated[Int, Field(ge=1)] = Field(
        300, description="tokens of either vocabulary that are compared, or all where a vocabulary has fewer"
    )
    ot_temperature: Annotated[Float, Field(gt=0)] = Field(
        2.0, description="divides the logits of both sides before the softmax over the top k"
    )
    interpolation_start: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the teacher in its logits at paired positions, at the start of the training"
    )
    interpolation_end: Annotated[Float, Field(ge=0, le=1)] = Field(1.0, description="that share at the end")
    alignment: Literal["index", "byte"] = Field(
        "byte",
        description="which positions are mixed: those that cover the same bytes, or the k-th with the k-th (published)",
    )
    window: Annotated[Int, Field(ge=0)] = Field(
        4, description="positions on either side that a hidden state is averaged with"
    )
    logits_weights: _Weights = Field(
        None,
        description="first weights of the costs l2, kl and salience; by default 0.2, 0.5, 0.3, with semi_dual 1/3 each (published)",
    )
    hidden_weights: _Weights = Field(
        None,
        description="first weights of the costs lexical, context and cosine; by default 0.3, 0.5, 0.2, with semi_dual 1/3 each (published)",
    )
    update_every: Annotated[Int, Field(ge=1)] = Field(
        1000, description="optimizer steps between two updates of the costs' weights; sinkhorn only"
    )
    sigma: Annotated[Float, Field(gt=0)] = Field(
        2.0, description="how strongly an update pulls the weights to 1/3 (older scripts: 0.7); sinkhorn only"
    )
    floor: Annotated[Float, Field(ge=0, le=1 / 3)] = Field(
        0.01, description="least weight of a cost after an update; sinkhorn only"
    )
    solver: Literal["sinkhorn", "semi_dual"] = Field(
        "sinkhorn",
        description="one plan for the weighted sum of the costs, or the semi-dual with one plan for each and weights learned by gradient",
    )
    epsilon: Annotated[Float, Field(gt=0)] = Field(
        0.1,
        description="entropic regularisation: sinkhorn, a multiple of a sequence's mean cost; semi_dual, of its largest (published)",
    )
    iterations: Annotated[Int, Field(ge=1)] = Field(200, description="of the solver, at most")
    tolerance: Annotated[Float, Field(ge=0)] = Field(
        1e-3, description="mass in the wrong place at which the solver stops, of 1"
    )
    debiased: Bool = Field(
        False,
        description="subtract half of the transport within either side, so that equal sides cost 0; sinkhorn only",
    )
    unrolled: Bool = Field(
        False,
        description="gradient through the iterations (published) instead of with the plan held fixed; sinkhorn only",
    )

    @model_validator(mode="after")
    def _weights_are_shares(self):
        for family in COSTS:
            weights = getattr(self, f"{family}_weights")
            if weights is not None and (abs(sum(weights) - 1) > 1e-6 or min(weights) < self.floor):
                raise ValueError(f"`{family}_weights` have to sum to 1 and be at least `floor` ({self.floor}) each")
        return self

    @model_validator(mode="after")
    def _options_belong_to_the_solver(self):
        for option in ("update_every", "sigma", "floor", "debiased", "unrolled"):
            if self.solver != "sinkhorn" and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"`{option}` is set but `solver` is {self.solver}: only sinkhorn reads it")
        return self

    def first_weights(self, family: str) -> list[float]:
        """Weights of a family's costs at the start of a training."""
        default = _START[family] if self.solver == "sinkhorn" else [1 / 3] * 3
        return list(getattr(self, f"{family}_weights") or default)


class McwKd(Method):
    """Multi-cost Wasserstein knowledge distillation (AAAI 2026, doi 10.1609/aaai.v40i39.40619).

        ce_rate · CE(z_s, y) + kd_rate · L_dskd_cma + w_logits · Σ_b n_b OT(C_logits) + w_hidden · Σ_b n_b OT(C_hidden)

    with, for every sequence b of n_b response tokens, entropic optimal transport between the student's positions i and the teacher's j
    under uniform masses and a cost C = Σ_k α_k C_k, α on the simplex. With q_i, p_j the softmax over the top k sorted logits, P_ot and w
    learned, and c the mean of the states within `window` positions:

        logits:  ‖q_i - p_j‖₂,  KL(p_j ‖ q_i),  |σ(w·h_s,i) - σ(w·P_ot h_t,j)|
        hidden:  edit distance of the tokens just read,  ‖c_i - c_j‖₂ / max,  1 - cos(c_i, c_j)

    At positions that the alignment pairs, the teacher's sorted logits are (1 - t) sg(z_s) + t z_t, t growing over the training.

    `sinkhorn`: OT = ⟨P, C⟩; the gradient takes P as a constant. Every `update_every` steps α is set from the mean of ⟨P, C_k⟩ / mean C_k
    since the last time (`kdbench.losses.ot.cost_weights`). `semi_dual`: OT = max over φ of ⟨φ, μ⟩ + Σ_k α_k ⟨φ^{c_k}, ν⟩ with φ on the
    teacher's positions, α = softmax(β), and β learned as the projectors are.
    """

    version = 1
    across_tokenizers = True
    Settings = McwKdSettings

    def __init__(self, settings: McwKdSettings, student: Shape, teacher: Shape | None, vocabulary=None):
        super().__init__(settings, student, teacher)
        require_signal("mcw_kd", teacher)
        self.cma = DskdCma(settings, student, teacher, vocabulary)
        self.ot = nn.Linear(teacher.hidden, student.hidden)
        self.salience = nn.Linear(student.hidden, 1)
        self.weights = {family: settings.first_weights(family) for family in COSTS}
        self._seen = {family: [0.0, 0.0, 0.0] for family in COSTS}
        self._tokens = 0
        if settings.solver == "semi_dual":
            for family, weights in self.weights.items():
                self.register_parameter(f"beta_{family}", nn.Parameter(torch.tensor(weights).log()))

    @classmethod
    def needs(cls, settings: McwKdSettings) -> Needs:
        return replace(DskdCma.needs(settings), alignment=settings.alignment, spelling=True)

    def initialize(self, student: Head, teacher: Head) -> None:
        self.cma.initialize(student, teacher)

    def forward(self, student: Signal, teacher: Signal | None, step: Step) -> Terms:
        require_signal("mcw_kd", teacher)
        require("mcw_kd", "pairs of rows", step.pairs)
        require("mcw_kd", "distances of spelling", step.spelling)
        k = min(self.settings.top_k, student.head.size, teacher.head.size)
        best, largest = [], []  # the student's tokens, whose logits will have a gradient, and the teacher's logits
        look = Look(
            lambda logits: best.append(mcw.largest_tokens(logits, k)),
            lambda logits: largest.append(mcw.largest_logits(logits, k)),
        )
        # Not called as a module: ZeRO stage 3 would put away the student's head when that is done, which is needed below.
        terms = self.cma.forward(student, teacher, step, look)
        projected = self.ot(teacher.rows.hidden.detach().to(self.ot.weight.dtype))
        if self.settings.anchor_rate:
            terms += self._anchor(student, projected, step.pairs)
        top = logits_at(student.rows.hidden, student.head, torch.cat(best))
        log_top = self._log_top(top, torch.cat(largest), step)
        counts = student.rows.counts, teacher.rows.counts
        with torch.autocast(projected.device.type, enabled=False):
            ours = self._side(student, student.rows.hidden, log_top[0])
            theirs = self._side(teacher, projected, log_top[1])
            terms += self._transport("logits", ours, theirs, counts, None)
            terms += self._transport("hidden", ours, theirs, counts, step.spelling)
        terms.diagnostics["aligned"] = torch.ones_like(step.pairs[:, 0]).sum()
        return terms

    def _anchor(self, student: Signal, projected: Tensor, pairs: Tensor) -> Terms:
        """Cross entropy of the teacher's projected states under the student's head, which is a constant, at paired positions."""
        ours, theirs = pairs.unbind(1)
        return over_vocabulary(
            lambda logits, targets: {"anchor": cross_entropy(logits, targets)},
            [(projected[theirs], student.head.detach())],
            [student.rows.targets[ours]],
            weights={"anchor": self.settings.anchor_rate},
        )

    def _log_top(self, ours: Tensor, theirs: Tensor, step: Step) -> list[Tensor]:
        """Log-probabilities over the top k of both sides, (n, k) and (m, k), from their logits; the teacher's interpolated."""
        settings = self.settings
        share = settings.interpolation_start
        share += (settings.interpolation_end - settings.interpolation_start) * step.progress
        theirs = mcw.interpolate(ours.detach(), theirs, step.pairs, share)
        return [(logits / settings.ot_temperature).log_softmax(-1) for logits in (ours, theirs)]

    def _side(self, signal: Signal, states: Tensor, log_top: Tensor) -> Side:
        """Of the student's states or of the teacher's projected ones."""
        counts, states = signal.rows.counts, states.to(self.salience.weight.dtype)
        salience = self.salience(states)[:, 0]
        context = mcw.window_means(pad(states, counts), counts, self.settings.window)
        return Side(pad(log_top, counts), pad(salience, counts), context, pad(signal.rows.inputs, counts))

    def _transport(self, family: str, ours: Side, theirs: Side, counts, lexical: Tensor | None) -> Terms:
        """The transport term of a family, weighted, and what it logs."""
        settings = self.settings

        def costs_of(one, other, counts, lexical, units):
            if family == "hidden":
                return mcw.hidden_costs(one, other, lexical, counts, units)
            return mcw.logits_costs(one, other, counts if settings.solver == "semi_dual" else None, units)

        costs, units = costs_of(ours, theirs, counts, lexical, None)
        controls = {"epsilon": settings.epsilon, "iterations": settings.iterations, "tolerance": settings.tolerance}
        logged = {}
        if settings.solver == "semi_dual":
            weights = getattr(self, f"beta_{family}").softmax(0)
            turned, theirs_first = [cost.mT for cost in costs], counts[::-1]
            found = semi_dual_potentials(turned, weights.detach(), *theirs_first, **controls)
            dual = semi_dual(turned, weights, found.row_potential, *theirs_first, epsilon=found.epsilon)
            value = dual.value
            logged |= {f"dual_{family}_{name}": of for name, of in zip(COSTS[family], dual.per_cost, strict=True)}
            logged |= {f"alpha_{family}_{name}": of for name, of in zip(COSTS[family], weights, strict=True)}
        else:
            controls["unrolled"] = settings.unrolled
            total = self._weighted(family, costs)
            if settings.debiased:
                within = [
                    self._weighted(family, costs_of(side, side, (count, count), None, units)[0])
                    for side, count in zip((ours, theirs), counts, strict=True)
                ]
                found = sinkhorn_divergence(total, *within, *counts, **controls)
            else:
                found = sinkhorn(total, *counts, **controls)
            value = found.value
        with torch.no_grad():
            for name, cost in zip(COSTS[family], costs, strict=True):
                logged[f"cost_{family}_{name}"] = means = mcw.mean_costs(cost, *counts)
                if settings.solver == "sinkhorn":
                    logged[f"paid_{family}_{name}"] = mcw.share_of_mean(cost, found.plan, means)
            logged |= {f"marginal_error_{family}": found.error, f"iterations_{family}": found.iterations}
            diagnostics = {name: (counts[0] * of).sum() for name, of in logged.items()}
        terms = weighted(
            {f"ot_{family}": (counts[0] * value).sum()}, {f"ot_{family}": getattr(settings, f"w_{family}")}
        )
        return Terms(terms.total, terms.sums, diagnostics)

    def _weighted(self, family: str, costs: list[Tensor]) -> Tensor:
        return sum(weight * cost for weight, cost in zip(self.weights[family], costs, strict=True))

    def observe(self, sums: dict[str, float], tokens: int, step: int) -> dict[str, float]:
        """Move the costs' weights when their time has come; they are logged as they will be in the next step."""
        settings = self.settings
        if settings.solver != "sinkhorn":
            return {}
        self._tokens += tokens
        for family, names in COSTS.items():
            seen = [sums[f"paid_{family}_{name}"] for name in names]
            self._seen[family] = [before + now for before, now in zip(self._seen[family], seen, strict=True)]
        if step % settings.update_every == 0:
            for family, seen in self._seen.items():
                means = torch.tensor(seen, dtype=torch.float64) / self._tokens
                self.weights[family] = cost_weights(means, settings.sigma, settings.floor).tolist()
                self._seen[family] = [0.0, 0.0, 0.0]
            self._tokens = 0
        return {
            f"alpha_{family}_{name}": weight
            for family, names in COSTS.items()
            for name, weight in zip(names, self.weights[family], strict=True)
        }

    def state(self) -> dict:
        if self.settings.solver != "sinkhorn":
            return {}
        return {"weights": dict(self.weights), "seen": dict(self._seen), "tokens": self._tokens}

    def restore(self, state: dict) -> None:
        if self.settings.solver == "sinkhorn":
            self.weights, self._seen, self._tokens = dict(state["weights"]), dict(state["seen"]), state["tokens"]
