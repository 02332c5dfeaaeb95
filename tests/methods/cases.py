"""Every method at work: real small models, batches, what a step knows of them."""

import os
from dataclasses import replace

import torch

from kdbench import methods, models
from kdbench.methods.base import Needs, Shape
from kdbench.signals import Head, Rows, Signal, Step
from tests import tiny
from tests.methods import relations

# Every method with its defaults, and further settings of some: name of the method and what differs from its defaults. KDBENCH_METHOD adds
# one that is no part of kdbench, by its path or name: see docs/adding_a_method.md.
OUTSIDE = [name for name in [os.environ.get("KDBENCH_METHOD")] if name]
CASES = {name: (name, {}) for name in methods.own() + OUTSIDE} | {
    "vanilla_kd_adaptive": ("vanilla_kd", {"objective": "adaptive_kl", "ce_rate": 0.2, "temperature": 1.0}),
    "dskd_skewed": ("dskd", {"objective": "skewed_reverse_kl", "kd_rate": 1.5}),
    "uld_byte": ("uld", {"alignment": "byte", "kd_rate": 1.5}),
    "mcw_kd_semi_dual": ("mcw_kd", {"solver": "semi_dual"}),
    "mcw_kd_debiased": ("mcw_kd", {"debiased": True, "anchor_rate": 0.5, "alignment": "index"}),
}


def needs(name: str) -> Needs:
    """What a case asks for."""
    method, settings = CASES[name]
    kind = methods.get(method)
    return kind.needs(kind.Settings(**settings))


WITH_SIGNAL = [name for name in CASES if needs(name).teacher == "signal"]


def across(name: str) -> bool:
    """Whether a case is tried with another tokenizer for the teacher."""
    return methods.get(CASES[name][0]).across_tokenizers and name in WITH_SIGNAL


def build(name: str, student: Shape, teacher: Shape, dtype=torch.float64):
    """The method of a case, with fixed projectors."""
    method, settings = CASES[name]
    kind = methods.get(method)
    vocabulary = relations.vocabulary(student.vocabulary, teacher.vocabulary) if needs(name).vocabulary else None
    torch.manual_seed(5)
    return kind(kind.Settings(**settings), student, teacher, vocabulary).to(dtype)


def step(name: str, ours: Rows, theirs: Rows | None) -> Step:
    """What the training loop would tell the method of a case."""
    return relations.relate(needs(name), ours, theirs)


class Pair:
    """A student and a teacher in float64, with tokenised records; a method's terms for any batch of them.

    Args:
        name: of the case.
        lengths: (prompt, response) of each record in the student's tokens, and in the teacher's.
        student: another model than a GPT2, with 40 rows in its head.
        teacher: makes another model than a Qwen2, with a given number of rows.
    """

    LENGTHS = ((3, 5), (7, 2), (2, 9), (5, 1), (4, 4)), ((4, 3), (6, 6), (3, 7), (5, 1), (2, 5))

    def __init__(
        self, name: str, dtype=torch.float64, lengths=LENGTHS, positions: int = 64, student=None, teacher=None
    ):
        self.name, self.dtype = name, dtype
        vocabulary = 50 if across(name) else 40
        lengths = lengths if across(name) else (lengths[0], lengths[0])
        self.student = (student or tiny.gpt2(positions=positions)).to(dtype)
        self.teacher = (teacher or tiny.qwen2)(vocabulary + 3).to(dtype)
        self.teacher.requires_grad_(False)
        self.sizes = 40 - 2, vocabulary - 2  # heads have more rows than the tokenizers have tokens
        self.data = [tiny.tokens(size, of) for size, of in zip(self.sizes, lengths, strict=True)]
        if across(name):
            self.data[1] = relations.make_tokens_alike(*self.data, relations.vocabulary(*self.sizes))
        both = list(zip((self.student, self.teacher), self.sizes, strict=True))
        self.method = build(name, *(models.shape(model, range(size)) for model, size in both), dtype)
        with torch.no_grad():
            self.method.initialize(*(models.head(model, size) for model, size in both))

    def sides(self, rows):
        return [tiny.side(data, rows) for data in self.data]

    def terms(self, rows, teacher=None):
        """The method's terms of a batch; `teacher` a source, by default the running model."""
        side, teacher_side = self.sides(rows)
        ours = models.signal(self.student, side, self.sizes[0])
        if self.name not in WITH_SIGNAL:
            return self.method(ours, None, Step())
        size = self.sizes[1]
        theirs = (
            teacher.signal(rows, teacher_side, "cpu") if teacher else models.signal(self.teacher, teacher_side, size)
        )
        return self.method(ours, theirs, step(self.name, ours.rows, theirs.rows))

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
        found.append(Signal(rows, Head(random(size + 3, width), size), random(size + 3, width).__getitem__))
    student, teacher = found
    if across(name):
        counts = student.rows.counts, teacher.rows.counts
        inputs = relations.make_alike(counts, student.rows.inputs, teacher.rows.inputs, relations.vocabulary(*sizes))
        teacher = replace(teacher, rows=replace(teacher.rows, inputs=inputs))
    if not across(name):
        teacher = replace(teacher, rows=replace(student.rows, hidden=teacher.rows.hidden))
    student.rows.hidden.requires_grad_()
    student.head.weight.requires_grad_()
    return student, teacher


def one_step(name: str):
    """A method with random signals and its step: (method, student, teacher, step)."""
    student, teacher = random_signals(name)
    shapes = [Shape(width, width, signal.head.size) for signal, width in ((student, 5), (teacher, 6))]
    method = build(name, *shapes)
    method.initialize(student.head.detach(), teacher.head)
    return method, student, teacher, step(name, student.rows, teacher.rows)
