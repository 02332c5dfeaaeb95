import itertools
import math

import numpy as np
import pytest
import torch

from kdbench.alignment.pairs import align
from kdbench.alignment.spelling import spell
from kdbench.alignment.vocabulary import texts_of
from kdbench.data import batches, world
from kdbench.data.tokens import tokenize
from kdbench.settings import Text
from tests import tiny
from tests.data.tokenizers import byte_level, sentencepiece
from tests.training import jobs

LENGTHS = np.random.default_rng(0).lognormal(4.5, 0.8, 1003).astype(int).clip(10, 512)


@pytest.mark.parametrize(("rows", "size"), [(1003, 8), (1003, 17), (16, 16), (3, 8)])
def test_every_record_once_in_as_many_steps_as_needed(rows, size):
    steps = batches.schedule(rows, size, epoch=0, seed=1)
    assert len(steps) == -(-rows // size)
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert {len(step) for step in steps[:-1]} <= {size}
    assert len(steps[-1]) == (rows % size or size)


def test_order_follows_seed_and_epoch_alone():
    def order(epoch, seed):
        return batches.schedule(len(LENGTHS), 8, epoch, seed)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)


def test_lengths_of_steps_follow_no_order():
    means = [LENGTHS[step].mean() for step in batches.schedule(len(LENGTHS), 8, epoch=0, seed=1)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("size", "world", "micro"), [(32, 1, 8), (32, 4, 3), (33, 2, 8), (5, 4, 1), (2, 4, 8), (1, 2, 1)]
)
def test_split_gives_all_processes_equally_many_parts(size, world, micro):
    batch = batches.schedule(len(LENGTHS), size, epoch=0, seed=1)[0]
    parts = [batches.split(batch, LENGTHS, LENGTHS, rank, world, micro) for rank in range(world)]
    assert sorted(row for mine in parts for part in mine for row in part) == sorted(batch)
    assert {len(mine) for mine in parts} == {math.ceil(math.ceil(size / world) / micro)}
    assert max(len(part) for mine in parts for part in mine) <= micro


@pytest.mark.parametrize("tokens", [1, 300, 700, 10**9])
@pytest.mark.parametrize(("size", "world", "micro"), [(32, 1, 8), (32, 4, 3), (33, 2, 8), (2, 4, 8)])
def test_split_keeps_to_a_number_of_tokens(size, world, micro, tokens):
    for batch in batches.schedule(len(LENGTHS), size, epoch=0, seed=1)[:20]:
        parts = [batches.split(batch, LENGTHS, LENGTHS, rank, world, micro, tokens) for rank in range(world)]
        assert sorted(row for mine in parts for part in mine for row in part) == sorted(batch)
        assert len({len(mine) for mine in parts}) == 1
        assert len({id(part) for mine in parts for part in mine}) == sum(
            map(len, parts)
        )  # the last of a step is told by `is`
        for part in (part for mine in parts for part in mine):
            assert len(part) <= micro
            assert len(part) <= 1 or LENGTHS[part].sum() <= tokens
        for mine in parts:  # no two neighbours would fit into one
            for one, other in itertools.pairwise(mine):
                if other:
                    assert len(one) == micro or LENGTHS[one].sum() + LENGTHS[other[0]] > tokens


@pytest.mark.parametrize(("world", "apart"), [(2, 0.12), (4, 0.2)])
def test_split_gives_all_processes_nearly_as_much_work(world, apart):
    """In turns by length, one process would have the longer record of each turn."""
    responses = np.random.default_rng(2).integers(1, LENGTHS)
    work = batches.work(LENGTHS, responses)
    excess = {"work": [], "tokens": [], "responses": []}
    for batch in batches.schedule(len(LENGTHS), 32, epoch=0, seed=1)[:-1]:
        parts = [batches.split(batch, LENGTHS, work, rank, world, 32)[0] for rank in range(world)]
        assert {len(part) for part in parts} == {32 // world}
        for name, costs in (("work", work), ("tokens", LENGTHS), ("responses", responses)):
            of_each = [costs[part].sum() for part in parts]
            excess[name].append(max(of_each) / np.mean(of_each) - 1)
    assert np.median(excess["work"]) < apart / 5
    assert max(np.median(excess["tokens"]), np.median(excess["responses"])) < apart


def test_split_of_one_process_has_no_empty_part():
    for size in range(1, 40):
        for micro in range(1, 9):
            assert all(batches.split(range(size), LENGTHS, LENGTHS, 0, 1, micro))


@pytest.mark.parametrize("rows", [[0], [3, 1], [4, 0, 2, 1, 3]])
def test_side_equals_the_form_written_position_by_position(rows):
    tokens = jobs.make_tokens(5, seed=9).student
    ours, plain = batches.side(tokens, rows), tiny.side(tokens, rows)
    assert ours.lengths == plain.lengths
    for name in vars(ours).keys() - {"lengths"}:
        value, expected = getattr(ours, name), getattr(plain, name)
        assert value.dtype == expected.dtype == torch.int64
        assert torch.equal(value, expected), name


def test_pairs_by_index_reach_to_the_shorter_response():
    tokens = jobs.make_tokens(6, seed=9, same=False)
    rows = [4, 0, 5]
    batch = batches.collate(tokens, rows, teacher=True, pairing="index")
    expected, ours, theirs = [], 0, 0
    for row in rows:
        s, t = int(tokens.student.response_counts[row]), int(tokens.teacher.response_counts[row])
        expected += [[ours + k, theirs + k] for k in range(min(s, t))]
        ours, theirs = ours + s, theirs + t
    assert batch.pairs.tolist() == expected
    assert (len(batch.student.targets), len(batch.teacher.targets)) == (ours, theirs)


def test_pairs_by_bytes_point_at_the_aligned_tokens():
    tokens = jobs.make_tokens(30, seed=9, same=False)
    alignment = jobs.make_alignment(tokens)
    rows = [int(row) for row in np.random.default_rng(1).permutation(30)[:11]]
    batch = batches.collate(tokens, rows, teacher=True, pairing="byte", alignment=alignment)
    found = [
        (rows[batch.student.sequence[s]], batch.student.targets[s].item(), batch.teacher.targets[t].item())
        for s, t in batch.pairs.tolist()
    ]
    expected = []
    for row in rows:
        ours, theirs = alignment.row(row)
        ids = [
            side.row(row)[side.prompt_lengths[row] + place]
            for side, place in ((tokens.student, ours), (tokens.teacher, theirs))
        ]
        expected += [(row, s, t) for s, t in zip(*(of.tolist() for of in ids), strict=True)]
        assert torch.equal(batch.teacher.sequence[batch.pairs[:, 1]], batch.student.sequence[batch.pairs[:, 0]])
    assert found == expected


def test_no_pairs_at_all_are_an_empty_tensor():
    tokens = jobs.make_tokens(100, seed=9, same=False)
    alignment = jobs.make_alignment(tokens)
    (row, *_) = np.flatnonzero(tokens.student.response_counts == 1)
    assert batches.collate(tokens, [row], teacher=True, pairing="byte", alignment=alignment).pairs.shape == (0, 2)


@pytest.fixture(scope="module")
def real():
    """Embedded records in two kinds of tokens, with all that is computed from the text."""
    pair = byte_level(), sentencepiece()
    text = Text(template="short", max_prompt_tokens=160, max_tokens=256)
    made = tokenize(world.records("shift", 20), *pair, text)
    return made, align(made), spell(made, *(texts_of(tokenizer).texts for tokenizer in pair))


ROWS = [[3], [7, 2], [11, 0, 4, 19, 5]]


@pytest.mark.parametrize("rows", ROWS)
def test_chunks_are_counted_over_the_batch(real, rows):
    tokens, alignment, _ = real
    batch = batches.collate(tokens, rows, teacher=True, alignment=alignment, chunks=True)
    expected, before = ([], []), 0
    for row in rows:
        last = 0
        for found, column, numbers in zip(
            expected,
            (tokens.student, tokens.teacher),
            (alignment.student_chunks, alignment.teacher_chunks),
            strict=True,
        ):
            for number in numbers[column.response_starts[row] : column.response_starts[row + 1]].tolist():
                found.append(before + number)
                last = max(last, before + number)
        before = last + 1
    ours, theirs = batch.chunks
    assert (ours.tolist(), theirs.tolist()) == expected
    assert ours.dtype == theirs.dtype == torch.int64
    assert set(ours.tolist()) == set(theirs.tolist()) == set(range(before))
    assert (len(ours), len(theirs)) == (len(batch.student.targets), len(batch.teacher.targets))
    assert (ours.diff() >= 0).all()
    assert (theirs.diff() >= 0).all()


@pytest.mark.parametrize("rows", ROWS)
def test_spelling_is_padded_to_the_longest_response(real, rows):
    tokens, _, spelling = real
    batch = batches.collate(tokens, rows, teacher=True, spelling=spelling, costs=True)
    n, m = (column.response_counts[rows] for column in (tokens.student, tokens.teacher))
    expected = torch.zeros(len(rows), n.max(), m.max())
    for place, row in enumerate(rows):
        ours, theirs = (
            lengths[column.response_starts[row] : column.response_starts[row + 1]].tolist()
            for column, lengths in (
                (tokens.student, spelling.student_lengths),
                (tokens.teacher, spelling.teacher_lengths),
            )
        )
        distances = spelling.distances[spelling.starts[row] :].tolist()
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                expected[place, i, j] = distances[i * len(theirs) + j] / max(a, b, 1)
    assert torch.equal(batch.spelling, expected)
    assert batch.spelling.dtype == torch.float32
    assert batch.spelling.max() <= 1


@pytest.mark.parametrize("rows", ROWS)
def test_warping_pairs_point_at_rows_of_the_batch(real, rows):
    tokens, _, spelling = real
    batch = batches.collate(tokens, rows, teacher=True, pairing="dtw", spelling=spelling)
    expected, ours, theirs = [], 0, 0
    for row in rows:
        expected += [[ours + i, theirs + j] for i, j in zip(*map(list, spelling.pairs.row(row)), strict=True)]
        ours += tokens.student.response_counts[row]
        theirs += tokens.teacher.response_counts[row]
    assert batch.pairs.tolist() == expected
    assert batch.pairs[:, 0].diff().min() > 0


def test_what_nobody_asked_for_is_not_there(real):
    tokens, alignment, spelling = real
    batch = batches.collate(tokens, [0, 1], teacher=True, alignment=alignment, spelling=spelling)
    assert batch.pairs is batch.chunks is batch.spelling is None
    assert batches.collate(tokens, [0]).teacher is None


def test_a_batch_moves_as_a_whole(real):
    tokens, alignment, spelling = real
    batch = batches.collate(tokens, [0, 1], True, "byte", alignment, spelling, chunks=True, costs=True).to("meta")
    sides = [
        value for side in (batch.student, batch.teacher) for name, value in vars(side).items() if name != "lengths"
    ]
    assert {value.device.type for value in [*sides, batch.pairs, *batch.chunks, batch.spelling]} == {"meta"}
    assert batch.rows == [0, 1]
