"""Every method at work: real small models, batches, pairs of rows."""

import torch

from kdbench import methods, models
from kdbench.methods.base import Shape
from kdbench.signals import Head, Rows, Signal, Step
from tests import tiny

# name of the method and settings that differ from its defaults
CASES = {
    "sft": ("sft", {}),
    "seqkd": ("seqkd", {}),
    "vanilla_kd": ("vanilla_kd", {}),
    "vanilla_kd_adaptive": ("vanilla_kd", {"objective": "adaptive_kl", "ce_rate": 0.2, "temperature": 1.0}),
    "dskd": ("dskd", {}),
    "dskd_skewed": ("dskd", {"objective": "skewed_reverse_kl", "kd_rate": 1.5}),
    "uld": ("uld", {}),
    "uld_byte": ("uld", {"alignment": "byte", "kd_rate": 1.5}),
}
WITH_SIGNAL = [name for name, (method, _) in CASES.items() if method not in ("sft", "seqkd")]


def across(name: str) -> bool:
    """Whether a case is tried with another tokenizer for the teacher."""
    return CASES[name][0] == "uld"


def build(name: str, student: Shape, teacher: Shape, dtype=torch.float64):
    """The method of a case, with fixed projectors."""
    method, settings = CASES[name]
    kind = methods.get(method)
    torch.manual_seed(5)
    return kind(kind.Settings(**settings), student, teacher).to(dtype)


def pairs(name: str, ours: Rows, theirs: Rows) -> torch.Tensor | None:
    """What the collator would give: rows paired by index, or for `byte` some subset of them, not always the same rank."""
    if not across(name):
        return None
    starts = [rows.counts.cumsum(0) - rows.counts for rows in (ours, theirs)]
    shared = torch.minimum(ours.counts, theirs.counts).tolist()
    by_index = torch.cat(
        [torch.stack([s + torch.arange(n), t + torch.arange(n)], 1) for s, t, n in zip(*starts, shared, strict=True)]
    )
    if name == "uld":
        return by_index
    last = torch.stack([rows.counts.cumsum(0) - 1 for rows in (ours, theirs)], 1)  # as for the end of text
    return torch.cat([by_index[::2], last]).unique(dim=0)


class Pair:
    """A student and a teacher in float64, with tokenised records; a method's terms for any batch of them."""

    def __init__(self, name: str, dtype=torch.float64):
        self.name, self.dtype = name, dtype
        vocabulary = 50 if across(name) else 40
        lengths = ((4, 3), (6, 6), (3, 7), (5, 1), (2, 5)) if across(name) else None
        self.student, self.teacher = tiny.gpt2().to(dtype), tiny.qwen2(vocabulary + 3).to(dtype)
        self.teacher.requires_grad_(False)
        self.sizes = 40 - 2, vocabulary - 2  # heads have more rows than the tokenizers have tokens
        self.data = tiny.tokens(38), tiny.tokens(vocabulary - 2, lengths) if lengths else tiny.tokens(38)
        self.method = build(name, Shape(16, 16, self.sizes[0]), Shape(24, 24, self.sizes[1]), dtype)

    def sides(self, rows, **padding):
        return [tiny.side(data, rows, **padding) for data in self.data]

    def terms(self, rows, teacher=None, **padding):
        """The method's terms of a batch; `teacher` a source, by default the running model."""
        side, teacher_side = self.sides(rows, **padding)
        ours = models.signal(self.student, side, self.sizes[0])
        if CASES[self.name][0] in ("sft", "seqkd"):
            return self.method(ours, None, Step())
        size = self.sizes[1]
        theirs = (
            teacher.signal(rows, teacher_side, "cpu") if teacher else models.signal(self.teacher, teacher_side, size)
        )
        return self.method(ours, theirs, Step(pairs=pairs(self.name, ours.rows, theirs.rows)))

    def parameters(self):
        return [*self.student.parameters(), *self.method.parameters()]

    def gradients(self, terms):
        return torch.autograd.grad(terms.total, self.parameters(), allow_unused=True)


def random_signals(name: str, n=(9, 7), sizes=(23, 31), widths=(5, 6), seed=0):
    """Two signals of random rows in float64, two sequences each, heads with padding rows; the student's leaves require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if not across(name):
        n, sizes = (n[0], n[0]), (sizes[0], sizes[0])
    found = []
    for count, size, width in zip(n, sizes, widths, strict=True):
        targets = torch.randint(size, (count,), generator=generator)
        counts = torch.tensor([4, count - 4])
        rows = Rows(random(count, width), targets, torch.repeat_interleave(torch.arange(2), counts), counts, targets)
        found.append(Signal(rows, Head(random(size + 3, width), size), embed=None))
    student, teacher = found
    if not across(name):
        teacher = Signal(Rows(teacher.rows.hidden, *[getattr(student.rows, f) for f in ("targets", "sequence", "counts", "inputs")]),
                         teacher.head, None)  # fmt: skip
    student.rows.hidden.requires_grad_()
    student.head.weight.requires_grad_()
    return student, teacher
