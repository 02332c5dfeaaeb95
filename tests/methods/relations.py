"""What a step knows of two tokenizations, made up for random tokens: by rules that look at one sequence alone, as the real relations do."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kdbench.data.tokens import TokenSide
from kdbench.methods.base import Needs
from kdbench.signals import Rows, Step, Vocabulary


def relate(needs: Needs, student: Rows, teacher: Rows | None, progress: float = 0.25) -> Step:
    """A step with everything that a method asks for, and nothing else."""
    if teacher is None:
        return Step(progress)
    counts = list(zip(student.counts.tolist(), teacher.counts.tolist(), strict=True))
    found = {}
    if needs.alignment != "none":
        found["pairs"] = _pairs(_PAIRED[needs.alignment], counts)
    if needs.chunks:
        found["chunks"] = _chunks(counts)
    if needs.spelling:
        found["spelling"] = _spelling(student, teacher)
    return Step(progress, **found)


def vocabulary(student: int, teacher: int, seed: int = 11) -> Vocabulary:
    """Some relation of two vocabularies of these sizes: token 0, the end of text, is the same in both."""
    generator = torch.Generator().manual_seed(seed)
    k = min(student, teacher) * 2 // 3
    ours = (1 + torch.randperm(student - 1, generator=generator)[: k - 1]).sort().values
    theirs = 1 + torch.randperm(teacher - 1, generator=generator)[: k - 1]
    shared = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.stack([ours, theirs], dim=1)])
    nearest = torch.randint(student, (teacher,), generator=generator)
    distance = torch.randint(1, 6, (teacher,), generator=generator)
    nearest[shared[:, 1]], distance[shared[:, 1]] = shared[:, 0], 0
    begins = [torch.rand(size, generator=generator) < 0.5 for size in (student, teacher)]
    for of in begins:
        of[0] = True
    return Vocabulary(nearest, distance, shared, *begins)


def make_alike(counts: tuple[Tensor, Tensor], student: Tensor, teacher: Tensor, of: Vocabulary) -> Tensor:
    """Tokens that a teacher's rows have read, some replaced: their nearest token is what a row of the student, paired by "dtw", has read.

    Random tokens would hardly ever be alike. Which rows they are follows from each sequence alone.

    Args:
        counts: (B,) rows of each sequence, of student and teacher.
        student: (n,) int64, the tokens its rows have read.
        teacher: (m,) int64.
        of: the relation of the vocabularies.
    """
    found, i, j = teacher.clone(), 0, 0
    for n, m in zip(*(of_side.tolist() for of_side in counts), strict=True):
        for one, other in _dtw(n, m)[::2]:
            partners = (of.nearest == student[i + one]).nonzero()
            if len(partners):
                found[j + other] = partners[0, 0]
        i, j = i + n, j + m
    return found


def make_tokens_alike(student: TokenSide, teacher: TokenSide, of: Vocabulary) -> TokenSide:
    """The same for tokenised records: the teacher's, with some tokens replaced."""
    places = [
        np.concatenate(
            [
                np.arange(s + p - 1, e - 1)
                for s, p, e in zip(side.starts, side.prompt_lengths, side.starts[1:], strict=False)
            ]
        )
        for side in (student, teacher)
    ]
    counts = tuple(torch.from_numpy(side.response_counts) for side in (student, teacher))
    read = [torch.from_numpy(side.ids[at]).long() for side, at in zip((student, teacher), places, strict=True)]
    ids = teacher.ids.copy()
    ids[places[1]] = make_alike(counts, *read, of).numpy()
    return replace(teacher, ids=ids)


def _index(n: int, m: int) -> list[tuple[int, int]]:
    return [(i, i) for i in range(min(n, m))]


def _byte(n: int, m: int) -> list[tuple[int, int]]:
    """One to one and ascending: every second token, where the teacher has one at the same share of the response; the two ends."""
    found = {(i * m // n): i for i in reversed(range(0, n - 1, 2))}
    found.pop(m - 1, None)
    return [*sorted((i, j) for j, i in found.items()), (n - 1, m - 1)]


def _dtw(n: int, m: int) -> list[tuple[int, int]]:
    """Each of some of the student's rows with one of the teacher's, which may be that of others too."""
    return [(i, i * m // n) for i in range(n) if i % 3 != 1]


_PAIRED = {"index": _index, "byte": _byte, "dtw": _dtw}


def _pairs(within, counts) -> torch.Tensor:
    found, i, j = [], 0, 0
    for n, m in counts:
        found += [(i + one, j + other) for one, other in within(n, m)]
        i, j = i + n, j + m
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def _chunks(counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of about two of the student's rows."""
    ours, theirs, before = [], [], 0
    for n, m in counts:
        chunks = min((n + 1) // 2, m)
        ours += [before + i * chunks // n for i in range(n)]
        theirs += [before + j * chunks // m for j in range(m)]
        before += chunks
    return torch.tensor(ours), torch.tensor(theirs)


def _spelling(student: Rows, teacher: Rows) -> torch.Tensor:
    """Numbers between 0 and 1 that depend on the two tokens alone, 0 for some pairs of them."""
    found = torch.zeros(len(student.counts), int(student.counts.max()), int(teacher.counts.max()))
    i = j = 0
    for row, (n, m) in enumerate(zip(student.counts.tolist(), teacher.counts.tolist(), strict=True)):
        ours, theirs = student.inputs[i : i + n, None], teacher.inputs[None, j : j + m]
        found[row, :n, :m] = (7 * ours + 3 * theirs) % 6 / 5
        i, j = i + n, j + m
    return found
