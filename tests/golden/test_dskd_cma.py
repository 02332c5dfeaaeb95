"""dskd_cma against the published criterion.

The golden logits are not head @ hidden; as in test_dskd.py a state is [logits, hidden] under the head [I, 0], and the projectors read and
write the parts that make the same numbers of it. What attention mixes are values, and it is linear in them, so it may come between a
projector and the head. The teacher's embeddings are widened to [0, embedding] like its states; what the published code divides by is handed
in, because it is the standard deviation of what is not widened, and over prompts and padding too in `as_published_code`.
"""

import math

import pytest
import torch
from torch.func import functional_call

from kdbench.losses.attention import deviation
from kdbench.losses.cross_entropy import correct
from kdbench.losses.vocabulary import rows_over_vocabulary
from kdbench.methods.base import Shape
from kdbench.methods.dskd_cma import DskdCma
from kdbench.signals import Head, Rows, Signal, Step
from tests.golden import golden
from tests.golden.test_dskd import COMPONENTS, _projector

LEAVES = [
    "student_logits",
    "student_hidden",
    *(f"proj_{name}_{part}" for name in ("t2s", "s2t", "query") for part in ("weight", "bias")),
]


class _Given(DskdCma):
    """What is divided by is given: standard deviations of index embeddings, target embeddings and states.

    Attributes:
        learns: the mixture that carries a gradient, 0 or 1; None for both.
    """

    given = learns = None

    def deviations(self, index, target, hidden, counts):
        return self.given

    def mixtures(self, student, teacher, step):
        found = super().mixtures(student, teacher, step)
        return tuple(of if self.learns in (None, space) else of.detach() for space, of in enumerate(found))


def _signal(label, logits, hidden, input_ids, embed):
    size, width = logits.shape[-1], hidden.shape[-1]
    weight = torch.cat([torch.eye(size), torch.zeros(size, width)], dim=1).to(logits.dtype)
    rows = golden.rows(label, torch.cat([logits, hidden], dim=-1), input_ids)
    return Signal(rows, Head(weight, size), embed)


def _deviations(variant, fixed, inputs):
    """Of the golden tensors, each over what the variant says; checks our function where it computes the same."""
    label = torch.tensor(inputs["teacher_label"]).long()
    valid = label != golden.IGNORED
    read, target = torch.tensor(inputs["teacher_input_ids"]).long(), label
    read, target = (fixed["teacher_embed"][ids.where(valid, 0)] for ids in (read, target))
    tensors = [torch.cat([read, target], -1), target, fixed["teacher_hidden"]]
    if variant == "as_published_code":
        return [tensor.std() for tensor in tensors]
    found = [deviation(tensor[valid], valid.sum(1), "batch") for tensor in tensors]
    for ours, tensor in zip(found, tensors, strict=True):
        torch.testing.assert_close(ours, tensor[valid].std().expand(int(valid.sum()), 1))
    return found


def _sequence(rows: Rows, number: int) -> Rows:
    chosen = rows.sequence == number
    fields = (rows.hidden[chosen], rows.targets[chosen], rows.sequence[chosen] * 0, rows.counts[[number]])
    return Rows(*fields, rows.inputs[chosen])


class _Case:
    """A golden case in one variant and precision, as signals, method and its parameters."""

    def __init__(self, case, inputs, precision, variant):
        self.params, self.precision = case["params"], precision
        self.leaves = {name: golden.leaf(inputs[name], precision) for name in LEAVES}
        fixed = {
            name: golden.leaf(array, precision).detach() for name, array in inputs.items() if array.dtype.kind == "f"
        }
        z_s, h_s = self.leaves["student_logits"], self.leaves["student_hidden"]
        self.student = _signal(inputs["label"], z_s, h_s, inputs["input_ids"], fixed["student_embed"].__getitem__)
        z_t, h_t, e_t = (fixed[f"teacher_{name}"] for name in ("logits", "hidden", "embed"))
        widened = torch.cat([e_t.new_zeros(len(e_t), z_t.shape[-1]), e_t], dim=-1)
        teacher = inputs["teacher_label"], z_t, h_t, inputs["teacher_input_ids"]
        self.teacher = _signal(*teacher, widened.__getitem__)
        self.deviations = _deviations(variant, fixed, inputs)
        t2s = _projector(*self._parameters("t2s"), fixed["student_lm_head"], z_t.shape[-1])
        s2t = _projector(*self._parameters("s2t"), fixed["teacher_lm_head"], z_s.shape[-1])
        self.weights = dict(zip(("t2s.weight", "t2s.bias", "s2t.weight", "s2t.bias"), (*t2s, *s2t), strict=True))
        self.weights |= self._query(z_t.shape[-1], h_t.shape[-1])
        self.widths = h_s.shape[-1], widened.shape[-1]

    def _parameters(self, name):
        return self.leaves[f"proj_{name}_weight"], self.leaves[f"proj_{name}_bias"]

    def _query(self, logits, hidden):
        """The published query for keys with `logits` zeros before each embedding, at the larger width that the scores are divided by."""
        scale = math.sqrt((logits + hidden) / hidden)
        weight, bias = (scale * part for part in self._parameters("query"))

        def widen(part):
            halves = part.unflatten(0, (2, hidden))
            return torch.cat([halves.new_zeros(2, logits, *halves.shape[2:]), halves], dim=1).flatten(0, 1)

        return {"query.weight": widen(weight), "query.bias": widen(bias)}

    def method(self, ce_rate, kd_rate):
        params, sizes = self.params, (self.student.head.size, self.teacher.head.size)
        settings = DskdCma.Settings(
            objective=params["kd_objective"],
            temperature=params["kd_temperature"],
            teacher_temperature=params["teacher_temperature"],
            ce_rate=ce_rate,
            kd_rate=kd_rate,
        )
        ours, theirs = self.widths
        student = Shape(self.student.head.weight.shape[1], ours, sizes[0])
        made = _Given(settings, student, Shape(theirs, theirs, sizes[1]))
        made.given = self.deviations
        return made

    def terms(self, ce_rate, kd_rate, learns=None):
        method = self.method(ce_rate, kd_rate)
        method.learns = learns
        return functional_call(method, self.weights, (self.student, self.teacher, Step()))

    def gradients(self, total):
        found = torch.autograd.grad(total, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        return dict(zip(self.leaves, found, strict=True))

    def max_t2s_prob(self):
        """With gradient, which the diagnostic of that name does not carry."""
        method, signals = self.method(0.0, 1.0), (self.student, self.teacher, Step())
        method.forward = method.mixtures
        projected, _ = functional_call(method, self.weights, signals)
        highest = rows_over_vocabulary(lambda logits: logits.softmax(-1).amax(-1), [(projected, self.student.head)])
        return highest.sum()

    def s2t_correct(self):
        """Correct rows of the teacher: our sum counts each n / m times, n and m the rows of its sequence, published: of the batch."""
        total = 0.0
        for number in range(len(self.student.rows.counts)):
            signals = [Signal(_sequence(of.rows, number), of.head, of.embed) for of in (self.student, self.teacher)]
            method = self.method(0.0, 1.0)
            chosen = self.teacher.rows.sequence == number
            method.given = [of if of.ndim == 0 else of[chosen] for of in self.deviations]
            found = functional_call(method, self.weights, (*signals, Step())).diagnostics["s2t_correct"].item()
            ours, theirs = (len(signal.rows.targets) for signal in signals)
            total += found * theirs / ours
        return total


def _variants(case):
    return case["expected"] if case else ["absent"]


def _parameters():
    return [
        pytest.param(*given.values, variant, marks=given.marks, id=f"{given.id}-{variant}")
        for given in golden.parameters("dual_space_kd_with_cma")
        for variant in _variants(given.values[0])
    ]


each = pytest.mark.parametrize(("case", "inputs", "precision", "variant"), _parameters())


@each
def test_loss_components_and_gradients(case, inputs, precision, variant):
    want, rate = case["expected"][variant]["f64"], case["params"]["kd_rate"]
    of = _Case(case, inputs, precision, variant)
    terms, components = of.terms(1 - rate, rate), want["components"]
    golden.assert_loss(terms.total, want["loss"], precision)
    assert set(want["grads"]) == set(LEAVES)
    gradients = of.gradients(terms.total)
    for name, checksum in want["grads"].items():
        golden.assert_gradient(gradients[name], checksum, precision)
    for published, ours in COMPONENTS.items():
        golden.assert_loss(terms.sums[ours], components[published], precision)
    golden.assert_loss(terms.diagnostics["max_t2s_prob"], components["max_t2s_prob"], precision)
    assert terms.diagnostics["t2s_correct"].item() == components["t2s_acc"]
    rows, size = of.student.rows, of.student.head.size
    assert correct(rows.hidden[:, :size], rows.targets).sum().item() == components["accuracy"]
    batch = len(rows.targets) / len(of.teacher.rows.targets)
    assert of.s2t_correct() * batch == pytest.approx(components["s2t_acc"], rel=1e-6)
    compared = {*COMPONENTS, "max_t2s_prob", "t2s_acc", "s2t_acc", "accuracy", "kd_loss", "loss"}
    assert set(components) == compared  # kd_loss is the next test's; loss is the total


@each
def test_gradient_of_each_component(case, inputs, precision, variant):
    """Only the query projector learns from two terms of distillation: with one mixture held fixed it learns from the other's alone."""
    want = case["expected"][variant]["f64"]
    of = _Case(case, inputs, precision, variant)
    golden.assert_loss(of.terms(0.0, 1.0).total, want["components"]["kd_loss"], precision)
    reference, whole = of.terms(1.0, 0.0).total, of.terms(0.0, 1.0).total
    in_student_space, in_teacher_space = (of.terms(0.0, 1.0, learns=space).total for space in (0, 1))
    losses = {
        "nll_loss": (reference, {"student_logits"}),
        "t2s_ce_loss": (in_student_space, set(LEAVES[2:4] + LEAVES[6:])),
        "t2s_kd_loss": (in_student_space, {"student_logits"}),
        "s2t_kd_loss": (in_teacher_space, {"student_hidden", *LEAVES[4:]}),
        "kd_loss": (whole, set(LEAVES)),
        "max_t2s_prob": (of.max_t2s_prob(), set(LEAVES[2:4] + LEAVES[6:])),
    }
    assert set(want["component_grads"]) == set(losses)
    for component, (loss, trained) in losses.items():
        gradients, checksums = of.gradients(loss), want["component_grads"][component]
        assert set(checksums) == trained
        for name, checksum in checksums.items():
            golden.assert_gradient(gradients[name], checksum, precision)
