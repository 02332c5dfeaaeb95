"""Rows of chunks, and the two parts of the hybrid loss."""

import pytest
import torch

from kdbench.losses import gold
from kdbench.losses.divergences import generalized_jsd
from kdbench.signals import Rows

#          first sequence    second         third: the end of text alone
STUDENT = [0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 6, 7]
TEACHER = [0, 1, 1, 2, 3, 4, 4, 5, 6, 7]
COUNTS = (torch.tensor([6, 5, 1]), torch.tensor([5, 4, 1]))


def _rows(counts, offset):
    n = int(counts.sum())
    targets = torch.arange(n) + offset
    inputs = (targets - 1).index_fill(0, counts.cumsum(0) - counts, -99)
    return Rows(torch.zeros(n, 1), targets, torch.repeat_interleave(torch.arange(len(counts)), counts), counts, inputs)


def _groups(**options):
    sides = [_rows(counts, offset) for counts, offset in zip(COUNTS, (100, 200), strict=True)]
    return sides, gold.groups(*sides, (torch.tensor(STUDENT), torch.tensor(TEACHER)), **options)


def _brute_force(side, chunks, merge, rows, skip_last):
    """The published lists of positions, row by row: base, and (other rows, tokens, which chunk)."""
    n, counts = len(chunks), side.counts.tolist()
    starts = [sum(counts[:i]) for i in range(len(counts))]
    ends = {start + count - 1 for start, count in zip(starts, counts, strict=True)}
    members = {}
    for row in range(n):
        if rows == "target":
            if not (skip_last and chunks[row] in {chunks[end] for end in ends}):
                members.setdefault(chunks[row], []).append((row, side.targets[row].item()))
        elif row not in starts:
            members.setdefault(chunks[row - 1], []).append((row, side.inputs[row].item()))
    base, others = [], []
    for index, chunk in enumerate(sorted(members)):
        kept = members[chunk]
        at = 0 if merge == "observed" else len(kept) - 1
        base.append(kept[at][0])
        others += [(*pair, index) for i, pair in enumerate(kept) if i != at]
    return base, others


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize(("rows", "skip_last"), [("target", True), ("target", False), ("input", True)])
def test_groups_are_those_of_a_loop_over_rows(merge, rows, skip_last):
    sides, found = _groups(merge=merge, rows=rows, skip_last=skip_last)
    for side, chunks, group in zip(sides, (STUDENT, TEACHER), found, strict=True):
        base, others = _brute_force(side, chunks, merge, rows, skip_last)
        assert group.base.tolist() == base
        assert list(zip(group.others.tolist(), group.tokens.tolist(), group.chunks.tolist(), strict=True)) == others


def test_a_chunk_that_loses_all_rows_on_one_side_is_left_out():
    """A response cut in the middle: its last token is read by no row, and that was all of the last chunk on one side."""
    side = _rows(torch.tensor([3]), 0)
    chunks = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    ours, theirs = gold.groups(side, side, chunks, merge="observed", rows="input", skip_last=True)
    assert ours.base.tolist() == [1]
    assert theirs.base.tolist() == [1]
    assert theirs.others.tolist() == [2]


def test_of_ends_of_text_alone_nothing_is_left():
    one = _rows(torch.tensor([1, 1]), 0)
    for rows in ("target", "input"):
        for group in gold.groups(one, one, (torch.arange(2),) * 2, merge="observed", rows=rows, skip_last=True):
            assert group.base.shape == group.others.shape == group.tokens.shape == group.chunks.shape == (0,)


def _measures(seed, columns=6, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(5, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_generalized_jsd_is_the_formula_on_measures(beta):
    q, p = _measures(0), _measures(1, scale=0.3)
    m = beta * p + (1 - beta) * q
    if beta == 0:
        plain = (p * (p / q).log()).sum(-1)
    elif beta == 1:
        plain = (q * (q / p).log()).sum(-1)
    else:
        plain = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(generalized_jsd(q.log(), p.log(), beta), plain, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: generalized_jsd(z, p.log(), beta), q.log().requires_grad_())
    log_p = p.log()
    torch.testing.assert_close(generalized_jsd(log_p, log_p, beta), torch.zeros(5).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.95])
def test_generalized_jsd_of_measures_is_not_negative(beta):
    for seed in range(20):
        assert (generalized_jsd(_measures(seed).log(), _measures(seed + 50, scale=0.01).log(), beta) > 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_generalized_jsd_is_finite_at_probabilities_of_zero(beta):
    log_q = torch.tensor([[0.0, -torch.inf, -torch.inf]], requires_grad=True)
    log_p = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    loss = generalized_jsd(log_q, log_p, beta)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), log_q)[0].isfinite().all()


def test_hybrid_splits_the_vocabulary():
    generator = torch.Generator().manual_seed(3)
    z_s, z_t = (torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (7, 9))
    factors = tuple(torch.rand(4, generator=generator, dtype=torch.float64).log() for _ in range(2))
    shared, rest = (
        (torch.tensor([0, 2, 5]), torch.tensor([0, 8, 3])),
        (torch.tensor([1, 3, 4, 6]), torch.tensor([1, 2, 4, 5, 6, 7])),
    )
    found = gold.hybrid(z_s, z_t, factors, shared, rest, 0.5)
    q, p = (f.exp()[:, None] * z.softmax(-1) for f, z in zip(factors, (z_s, z_t), strict=True))
    torch.testing.assert_close(
        found["matched"], generalized_jsd(q[:, [0, 2, 5]].log(), p[:, [0, 8, 3]].log(), 0.5), rtol=1e-12, atol=1e-14
    )
    for row in range(4):
        ours = [*sorted(q[row, rest[0]].tolist(), reverse=True), 0.0, 0.0]
        theirs = sorted(p[row, rest[1]].tolist(), reverse=True)
        expected = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert found["unmatched"][row].item() == pytest.approx(expected, rel=1e-12)

    def total(z_s, factor):
        return sum(gold.hybrid(z_s, z_t, (factor, factors[1]), shared, rest, 0.5).values())

    assert torch.autograd.gradcheck(total, (z_s.requires_grad_(), factors[0].requires_grad_()))
