"""What the tests of mcw_kd have in common: a method with random signals, and its costs and plans written once more."""

import ot as pot
import torch
import torch.nn.functional as F

from kdbench.methods.base import Needs, Shape
from kdbench.methods.mcw_kd import McwKd
from tests.methods import relations
from tests.methods.cases import random_signals

EXACT = {"tolerance": 1e-13, "iterations": 20000}
PURE = {"interpolation_start": 1.0, "interpolation_end": 1.0}  # nothing of the student on the teacher's side
FIRST = {"logits": [0.2, 0.5, 0.3], "hidden": [0.3, 0.5, 0.2]}


def method_of(student, teacher, **settings):
    widths = [signal.rows.hidden.shape[1] for signal in (student, teacher)]
    torch.manual_seed(5)
    shapes = (Shape(width, width, of.head.size) for width, of in zip(widths, (student, teacher), strict=True))
    return McwKd(McwKd.Settings(**settings), *shapes).double()


def step_of(student, teacher, progress=0.25, alignment="byte"):
    return relations.relate(Needs("signal", alignment=alignment, spelling=True), student.rows, teacher.rows, progress)


def given(**settings):
    """Sequences of 4 and 5 rows, the teacher's of 4 and 3."""
    student, teacher = random_signals("mcw_kd")
    return method_of(student, teacher, **settings), student, teacher, step_of(student, teacher)


def _sorted(signal, k):
    return (signal.rows.hidden @ signal.head.weight.T)[:, : signal.head.size].sort(-1, descending=True).values[:, :k]


def _windows(states, reach):
    return torch.stack([states[max(i - reach, 0) : i + reach + 1].mean(0) for i in range(len(states))])


def costs_of(method, student, teacher, step):
    """For each sequence and family its costs, written cell by cell."""
    settings = method.settings
    k = min(settings.top_k, student.head.size, teacher.head.size)
    z_s, z_t = _sorted(student, k), _sorted(teacher, k).clone()
    t = settings.interpolation_start + step.progress * (settings.interpolation_end - settings.interpolation_start)
    for i, j in step.pairs.tolist():
        z_t[j] = (1 - t) * z_s[i].detach() + t * z_t[j]
    q, p = ((z / settings.ot_temperature).softmax(-1) for z in (z_s, z_t))
    projected = method.ot(teacher.rows.hidden)
    sal_s, sal_t = (method.salience(of)[:, 0].sigmoid() for of in (student.rows.hidden, projected))
    found, i, j = [], 0, 0
    for b, (n, m) in enumerate(zip(student.rows.counts.tolist(), teacher.rows.counts.tolist(), strict=True)):
        ours, theirs = slice(i, i + n), slice(j, j + m)
        c_s, c_t = (_windows(of, settings.window) for of in (student.rows.hidden[ours], projected[theirs]))
        distance = (c_s[:, None] - c_t[None]).norm(dim=-1)
        logits = [
            (q[ours, None] - p[None, theirs]).norm(dim=-1),
            (p[None, theirs] * (p[None, theirs] / q[ours, None]).log()).sum(-1),
            (sal_s[ours, None] - sal_t[None, theirs]).abs(),
        ]
        if settings.solver == "semi_dual":
            logits = [cost / cost.max() for cost in logits]
        cosine = 1 - F.cosine_similarity(c_s[:, None], c_t[None], dim=-1)
        hidden = [step.spelling[b, :n, :m].double(), distance / distance.max(), cosine]
        found.append({"logits": logits, "hidden": hidden})
        i, j = i + n, j + m
    return found


def plan_of(cost, epsilon):
    """By another library, uniform masses."""
    a, b = ([1 / size] * size for size in cost.shape)
    cost = cost.detach().numpy()
    plan = pot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", numItermax=100000, stopThr=1e-15)
    return torch.tensor(plan)
