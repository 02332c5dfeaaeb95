"""Attention between two models' rows, against loops over its definition."""

import math

import pytest
import torch

from kdbench.losses.attention import cross_attention, deviation

OURS, THEIRS = torch.tensor([4, 1, 3]), torch.tensor([2, 3, 4])
# Chunks of the three sequences: of 4 rows against 2, 1 against 3, 3 against 4.
CHUNKS = torch.tensor([0, 0, 1, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 2, 2, 2, 3, 3, 4, 4])


def _random(*shape, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def _inputs(requires_grad=False):
    shapes = (8, 6), (9, 6), (8, 2), (9, 3)
    return [_random(*shape, seed=seed, requires_grad=requires_grad) for seed, shape in enumerate(shapes)]


def _sees(reader, i, read, j):
    """A state has read all chunks before that of its row, and the rows of that chunk that come before it."""
    is_first = j == 0 or read[j - 1] != read[j]
    return read[j] < reader[i] or (read[j] == reader[i] and is_first)


def _loop(queries, keys, values, query_counts, key_counts, chunks=None):
    found, start, key_start = [], 0, 0
    for n, m in zip(query_counts.tolist(), key_counts.tolist(), strict=True):
        for i in range(start, start + n):
            seen = [j for j in range(key_start, key_start + m) if chunks is None or _sees(chunks[0], i, chunks[1], j)]
            scores = torch.stack([queries[i] @ keys[j] for j in seen]) / math.sqrt(queries.shape[1])
            found.append(sum(a * values[j] for a, j in zip(scores.softmax(0), seen, strict=True)))
        start, key_start = start + n, key_start + m
    return torch.stack(found)


@pytest.mark.parametrize("chunks", [None, CHUNKS])
def test_mixtures_and_gradients_are_those_of_the_definition(chunks):
    queries, keys, student_values, teacher_values = inputs = _inputs(requires_grad=True)
    found = cross_attention(*inputs, (OURS, THEIRS), chunks)
    expected = (
        _loop(queries, keys, teacher_values, OURS, THEIRS, chunks),
        _loop(keys, queries, student_values, THEIRS, OURS, chunks and chunks[::-1]),
    )
    torch.testing.assert_close(found, expected)
    weights = [_random(*of.shape, seed=9) for of in found]
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(of, weights, strict=True)), inputs)
        for of in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("chunks", [None, CHUNKS])
def test_gradcheck(chunks):
    assert torch.autograd.gradcheck(
        lambda *of: cross_attention(*of, (OURS, THEIRS), chunks), _inputs(requires_grad=True)
    )


def test_with_chunks_no_row_learns_of_text_that_it_has_not_read():
    queries, keys, student_values, teacher_values = _inputs()
    before = cross_attention(queries, keys, student_values, teacher_values, (OURS, THEIRS), CHUNKS)
    # In the last sequence the teacher's rows 6 and 8 have read a part of chunks 3 and 4: no row of the student has, before row 6.
    keys, teacher_values = keys.clone(), teacher_values.clone()
    keys[6], teacher_values[6] = 5.0, 100.0
    keys[8], teacher_values[8] = 5.0, 100.0
    after = cross_attention(queries, keys, student_values, teacher_values, (OURS, THEIRS), CHUNKS)
    torch.testing.assert_close(after[0][:6], before[0][:6], rtol=0, atol=0)
    assert not torch.equal(after[0][6:], before[0][6:])


def test_sequences_do_not_see_each_other():
    inputs = _inputs()
    together = cross_attention(*inputs, (OURS, THEIRS), CHUNKS)
    queries, keys, student_values, teacher_values = inputs
    alone = cross_attention(
        queries[5:], keys[5:], student_values[5:], teacher_values[5:], (OURS[2:], THEIRS[2:]), (CHUNKS[0][5:] - 3, CHUNKS[1][5:] - 3)
    )  # fmt: skip
    torch.testing.assert_close(alone, (together[0][5:], together[1][5:]))


def test_of_a_single_row_the_mixture_is_its_value():
    inputs = [of[:1] for of in _inputs()]
    one = torch.tensor([1])
    to_student, to_teacher = cross_attention(*inputs, (one, one))
    torch.testing.assert_close((to_teacher, to_student), (inputs[2], inputs[3]))


def test_nan_stays_nan_in_its_sequence():
    queries, keys, student_values, teacher_values = _inputs()
    keys[0, 0] = math.nan
    to_student, to_teacher = cross_attention(queries, keys, student_values, teacher_values, (OURS, THEIRS))
    assert to_student[:4].isnan().all()
    assert to_teacher[0].isnan().all()
    assert to_student[4:].isfinite().all()


def test_autocast_does_not_narrow_it():
    inputs = [of.float() for of in _inputs()]
    expected = cross_attention(*inputs, (OURS, THEIRS))
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_attention(*inputs, (OURS, THEIRS))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_deviation_of_sequences_and_of_the_batch():
    values = _random(9, 5) * torch.arange(1, 10)[:, None]
    of_sequence = deviation(values, THEIRS, "sequence").squeeze(1)
    expected = [rows.std() for rows in values.split(THEIRS.tolist()) for _ in rows]
    torch.testing.assert_close(of_sequence, torch.stack(expected))
    torch.testing.assert_close(deviation(values, THEIRS, "batch").squeeze(1), values.std().expand(9))


def test_deviation_of_bfloat16_is_that_of_float32():
    values = _random(9, 5).bfloat16()
    for over in ("sequence", "batch"):
        torch.testing.assert_close(
            deviation(values, THEIRS, over), deviation(values.float(), THEIRS, over), rtol=0, atol=0
        )
