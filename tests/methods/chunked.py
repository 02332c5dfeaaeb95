"""Random signals of two tokenizations whose chunks are known, for methods that compare chunks."""

from dataclasses import replace

import torch

from kdbench import methods
from kdbench.methods.base import Shape
from kdbench.signals import Head, Rows, Signal, Step
from tests.methods import relations

SIZES = 23, 31
# Rows of each chunk, (student, teacher), sequence after sequence; every response ends with the end of text on both sides.
SEQUENCES = (((1, 1), (2, 1), (1, 3), (2, 2), (1, 1)), ((1, 1),), ((3, 2), (1, 1), (1, 1)), ((1, 2), (1, 1)))


def step(sequences=SEQUENCES) -> Step:
    """The chunks of some sequences."""
    lengths = [chunk for sequence in sequences for chunk in sequence]
    numbers = torch.arange(len(lengths))
    return Step(
        chunks=tuple(
            torch.repeat_interleave(numbers, torch.tensor([pair[side] for pair in lengths])) for side in (0, 1)
        )
    )


def signals(sequences=SEQUENCES, sizes=SIZES, widths=(5, 6), seed=0, scale=1.0, dtype=torch.float64):
    """Student, whose leaves require gradients, and teacher; heads have more rows than the vocabularies tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for side, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        counts = torch.tensor([sum(chunk[side] for chunk in sequence) for sequence in sequences])
        n, starts = int(counts.sum()), counts.cumsum(0) - counts
        targets = torch.randint(1, size, (n,), generator=generator)
        targets[counts.cumsum(0) - 1] = 0
        prompts = torch.randint(1, size, (len(counts),), generator=generator)
        inputs = targets.roll(1).index_copy(0, starts, prompts)
        hidden = scale * torch.randn(n, width, generator=generator, dtype=dtype)
        rows = Rows(hidden, targets, torch.repeat_interleave(torch.arange(len(counts)), counts), counts, inputs)
        weight = torch.randn(size + 3, width, generator=generator, dtype=dtype)
        found.append(Signal(rows, Head(weight, size, torch.randn(size + 3, generator=generator, dtype=dtype)), None))
    student, teacher = found
    student.rows.hidden.requires_grad_()
    student.head.weight.requires_grad_()
    return student, teacher


def build(name: str, sizes=SIZES, vocabulary=None, **settings):
    """A method with settings that differ from its defaults."""
    kind = methods.get(name)
    vocabulary = vocabulary or relations.vocabulary(*sizes)
    return kind(kind.Settings(**settings), Shape(5, 5, sizes[0]), Shape(6, 6, sizes[1]), vocabulary)


def logits(signal: Signal):
    """All logits at once."""
    return signal.rows.hidden @ signal.head.weight.T + signal.head.bias


def leaves(student: Signal):
    """What the student's gradient is taken of."""
    return [student.rows.hidden, student.head.weight]


def same_tokens(lengths=(4, 1, 3), size=SIZES[0]):
    """Two different models of one tokenizer: signals, and a step in which every chunk is one token."""
    sequences = tuple(((1, 1),) * length for length in lengths)
    student, teacher = signals(sequences, sizes=(size, size))
    teacher = replace(teacher, rows=replace(student.rows, hidden=teacher.rows.hidden))
    return student, teacher, step(sequences)


def rows_of_chunks(sequences=SEQUENCES):
    """For each chunk its sequence and its rows on either side, as lists: for formulas that loop."""
    found, at = [], [0, 0]
    for sequence, chunks in enumerate(sequences):
        for chunk in chunks:
            rows = [list(range(start, start + length)) for start, length in zip(at, chunk, strict=True)]
            found.append((sequence, *rows))
            at = [start + length for start, length in zip(at, chunk, strict=True)]
    return found
