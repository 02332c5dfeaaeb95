"""Batches of tokenised records: which records make a step, and the tensors of a forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdbench.alignment.spelling import normalised


@dataclass(frozen=True)
class Side:
    """One model's tensors of a batch: the tokens of its sequences one after the other, T in all, without padding.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, each token's place in its sequence, from 0.
        lengths: (B,) tokens of each sequence, as numbers: shapes follow from them, which must not wait for a device.
        positions: (n,) int64, places in `input_ids` whose next token is a response token; ascending.
        targets: (n,) int64, those response tokens.
        sequence: (n,) int64, the sequence of the batch that each belongs to.
        counts: (B,) int64, response tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    sequence: Tensor
    counts: Tensor

    def to(self, device) -> "Side":
        """The same tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    Attributes:
        rows: the records, as numbers in the tokenised data set.
        student: the student's tensors of them.
        teacher: the teacher's, or None where no method asked for its signal.
        pairs: (p, 2) int64, response rows of the student and of the teacher in this batch that belong together, or None.
        chunks: (n,) and (m,) int64, chunks of the response rows, or None; see `kdbench.signals.Step`.
        spelling: (B, N, M) float32, distances of the tokens just read, or None; see there.
    """

    rows: list[int]
    student: Side
    teacher: Side | None = None
    pairs: Tensor | None = None
    chunks: tuple[Tensor, Tensor] | None = None
    spelling: Tensor | None = None

    def to(self, device) -> "Batch":
        """The same batch on another device."""

        def move(value):
            return None if value is None else value.to(device, non_blocking=True)

        return replace(
            self,
            student=self.student.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
            pairs=move(self.pairs),
            chunks=None if self.chunks is None else tuple(map(move, self.chunks)),
            spelling=move(self.spelling),
        )


def schedule(records: int, batch_size: int, epoch: int, seed: int) -> list[list[int]]:
    """The optimizer steps of one epoch: a random order, cut into ceil(records / batch_size) global batches, the last one smaller.

    Nothing here depends on the method, on micro-batches or on the number of processes: runs of one seed see the same records in the same
    order. Lengths have no say either. Records of like length are often of one kind, and steps that see one kind each learn worse: on the
    embedded experiment the teacher's dev loss after an epoch was 0.80 with batches sorted by length among 50, and 0.49 with random ones.
    Sorting would save padding, but there is none: see `Side` and `kdbench.packing`.

    Args:
        records: how many there are.
        batch_size: records of a step.
        epoch: counted from 0; each has its own order.
        seed: of the run.
    """
    order = np.random.default_rng([seed, epoch]).permutation(records)
    return [order[start : start + batch_size].tolist() for start in range(0, records, batch_size)]


def work(lengths: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """What records cost: their tokens, which the models read, and their response tokens, which the losses see; half each over the data set.

    Args:
        lengths: (R,) tokens of each record.
        responses: (R,) those of its response.
    """
    return lengths / lengths.mean() + responses / responses.mean()


def split(
    batch: Sequence[int],
    lengths: np.ndarray,
    work: np.ndarray,
    rank: int,
    world: int,
    micro: int,
    tokens: int | None = None,
) -> list[list[int]]:
    """The micro-batches of one process: as many as every other process has, of like lengths.

    No process gets more than its share of the records, rounded up, and all get nearly as much work, so that none waits long for another.
    Where a process has fewer records than micro-batches, some of them are empty.

    Args:
        batch: records of a step.
        lengths: (R,) tokens of each record of the data set.
        work: (R,) what each record costs, see `work`.
        rank: the process, of `world`.
        micro: records of one forward pass at most.
        tokens: tokens of one forward pass at most, but for a record that is longer by itself; by default any number.
    """
    shares = _shares(np.asarray(batch), lengths, work, world)
    if tokens is None:
        parts = math.ceil(math.ceil(len(batch) / world) / micro)
        return [part.tolist() for part in np.array_split(np.asarray(shares[rank], dtype=np.int64), parts)]
    cut = [_fill(share, lengths, micro, tokens) for share in shares]
    return cut[rank] + [[] for _ in range(max(map(len, cut)) - len(cut[rank]))]


def _shares(batch: np.ndarray, lengths: np.ndarray, work: np.ndarray, world: int) -> list[list[int]]:
    """The records of each process, from the shortest to the longest: the most work is dealt first, each to whom it burdens least."""
    shares, loads, most = [[] for _ in range(world)], [0.0] * world, math.ceil(len(batch) / world)
    for place in np.argsort(-work[batch], kind="stable").tolist():
        takes = min((of for of in range(world) if len(shares[of]) < most), key=loads.__getitem__)
        shares[takes].append(place)
        loads[takes] += float(work[batch[place]])
    places = [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]
    return [batch[share[np.argsort(lengths[batch[share]], kind="stable")]].tolist() for share in places]


def _fill(records: list[int], lengths: np.ndarray, micro: int, tokens: int) -> list[list[int]]:
    """Records in this order, cut where the next one would make it more than `micro` records or `tokens` tokens."""
    parts, room = [], 0
    for record in records:
        if room < lengths[record] or len(parts[-1]) == micro:
            parts.append([])
            room = tokens
        parts[-1].append(record)
        room -= lengths[record]
    return parts


def side(column, rows: Sequence[int]) -> Side:
    """One model's tensors of some records, on the CPU.

    Args:
        column: one side of `kdbench.data.tokens.Tokens`: `ids` (all tokens), `starts` (R + 1), `prompt_lengths` (R), at least 1 each.
        rows: the records.
    """
    rows = np.asarray(rows, dtype=np.int64)
    starts = column.starts[rows]
    sizes = column.starts[rows + 1] - starts
    counts = sizes - column.prompt_lengths[rows]
    input_ids = column.ids[_ranges(starts, sizes)].astype(np.int64)
    # The last response token of a sequence stands at its end; what predicts a token stands before it.
    positions = _ranges(np.cumsum(sizes) - counts, counts) - 1
    places = _ranges(np.zeros_like(sizes), sizes)
    sequence = np.repeat(np.arange(len(rows)), counts)
    tensors = map(torch.from_numpy, (positions, input_ids[positions + 1], sequence, counts))
    return Side(torch.from_numpy(input_ids), torch.from_numpy(places), tuple(sizes.tolist()), *tensors)


def collate(
    tokens,
    rows: Sequence[int],
    teacher: bool = False,
    pairing: str = "none",
    alignment=None,
    spelling=None,
    chunks: bool = False,
    costs: bool = False,
) -> Batch:
    """The tensors of some records, on the CPU.

    Args:
        tokens: `kdbench.data.tokens.Tokens`.
        rows: the records; at least one.
        teacher: whether the teacher's side is wanted.
        pairing: "none"; "index": response tokens of one place; "byte": those that `alignment` pairs; "dtw": those that `spelling` pairs.
        alignment: `kdbench.alignment.pairs.Alignment` of the same records, for "byte" and for chunks.
        spelling: `kdbench.alignment.spelling.Spelling` of the same records, for "dtw" and for costs.
        chunks: whether chunks are wanted.
        costs: whether `Batch.spelling` is wanted.
    """
    rows = [int(row) for row in rows]
    batch = Batch(rows, side(tokens.student, rows), side(tokens.teacher, rows) if teacher else None)
    if pairing != "none":
        batch = replace(batch, pairs=_pairs(tokens, rows, pairing, spelling.pairs if pairing == "dtw" else alignment))
    if chunks:
        batch = replace(batch, chunks=_chunks(tokens, rows, alignment))
    if costs:
        batch = replace(batch, spelling=_costs(tokens, rows, spelling))
    return batch


def _pairs(tokens, rows: list[int], pairing: str, alignment) -> Tensor:
    ours, theirs = (column.response_counts[rows] for column in (tokens.student, tokens.teacher))
    if pairing == "index":
        sizes = np.minimum(ours, theirs)
        within = (_ranges(np.zeros_like(sizes), sizes),) * 2
    else:
        starts = alignment.starts[rows]
        sizes = alignment.starts[np.asarray(rows) + 1] - starts
        chosen = _ranges(starts, sizes)
        within = (alignment.student[chosen], alignment.teacher[chosen])
    pairs = [
        place + np.repeat(np.cumsum(counts) - counts, sizes)
        for place, counts in zip(within, (ours, theirs), strict=True)
    ]
    return torch.from_numpy(np.stack(pairs, axis=1).astype(np.int64))


def _chunks(tokens, rows: list[int], alignment) -> tuple[Tensor, Tensor]:
    """Both sides have the same chunks, so the student's tell how many each record has."""
    before, found = None, []
    for column, numbers in ((tokens.student, alignment.student_chunks), (tokens.teacher, alignment.teacher_chunks)):
        starts, counts = column.response_starts[rows], column.response_counts[rows]
        if before is None:
            of_records = numbers[starts + counts - 1].astype(np.int64) + 1
            before = np.cumsum(of_records) - of_records
        found.append(torch.from_numpy(numbers[_ranges(starts, counts)] + np.repeat(before, counts)))
    return found[0], found[1]


def _costs(tokens, rows: list[int], spelling) -> Tensor:
    sides = ((tokens.student, spelling.student_lengths), (tokens.teacher, spelling.teacher_lengths))
    counts = [column.response_counts[rows] for column, _ in sides]
    places = [np.arange(of.max()) < of[:, None] for of in counts]
    lengths = []
    for (column, of_tokens), inside in zip(sides, places, strict=True):
        padded = np.zeros(inside.shape, np.int64)
        padded[inside] = of_tokens[_ranges(column.response_starts[rows], column.response_counts[rows])]
        lengths.append(padded)
    distances = np.zeros((len(rows), places[0].shape[1], places[1].shape[1]), spelling.distances.dtype)
    distances[places[0][:, :, None] & places[1][:, None, :]] = spelling.distances[
        _ranges(spelling.starts[rows], counts[0] * counts[1])
    ]
    return torch.from_numpy(normalised(distances, *lengths))


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, …, start + size - 1 of each range, one after the other."""
    return np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
