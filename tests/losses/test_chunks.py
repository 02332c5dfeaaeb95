import torch

from kdbench.losses import chunks

OURS, THEIRS = torch.tensor([0, 1, 1, 2, 3, 3, 3]), torch.tensor([0, 0, 1, 2, 3])
SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def test_sums_sizes_and_owners():
    values = torch.arange(1.0, 8.0, dtype=torch.float64)
    assert chunks.count(OURS) == 4
    assert chunks.sums(values, OURS, 4).tolist() == [1.0, 5.0, 4.0, 18.0]
    assert chunks.sizes(THEIRS, 4).tolist() == [2, 1, 1, 1]
    assert chunks.owners(OURS, SEQUENCE, 4).tolist() == [0, 0, 1, 1]


def test_sums_are_differentiable():
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: chunks.sums(v, OURS, 4) ** 2, values)


def test_weights_make_a_mean_of_each_sequence_times_its_rows():
    owner, counts = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 4])
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    weights = chunks.mean_weights(owner, counts, torch.float64)
    assert weights.dtype == torch.float64
    torch.testing.assert_close((weights * loss).sum().item(), 3 * 1.5 + 4 * 5.0)


def test_a_sequence_without_chunks_has_no_weight():
    weights = chunks.mean_weights(torch.tensor([1]), torch.tensor([3, 4]), torch.float64)
    assert weights.tolist() == [4.0]


def test_rows_that_are_alone_in_their_chunk():
    assert chunks.alone(OURS, THEIRS).tolist() == [False, False, False, True, False, False, False]
    assert chunks.alone(torch.arange(5), torch.arange(5)).all()


def test_no_rows():
    none = torch.zeros(0, dtype=torch.long)
    assert chunks.count(none) == 0
    assert chunks.sums(torch.zeros(0), none, 0).shape == chunks.alone(none, none).shape == (0,)
    assert chunks.mean_weights(none, torch.tensor([2]), torch.float32).shape == (0,)
