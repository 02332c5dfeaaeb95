import torch

from kdbench.losses.cross_entropy import correct, cross_entropy


def test_is_minus_the_log_probability_of_the_target():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3, 5, 1])
    expected = [-logits[i].softmax(0)[target].log() for i, target in enumerate(targets)]
    torch.testing.assert_close(cross_entropy(logits, targets), torch.stack(expected))


def test_a_broken_logit_is_not_repaired():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    assert cross_entropy(logits, torch.tensor([0, 1, 2])).isnan().tolist() == [False, True, False]


def test_counts_rows_whose_target_is_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    assert correct(logits, torch.tensor([1, 2])).tolist() == [1.0, 0.0]
    assert correct(logits, torch.tensor([1, 2])).dtype == torch.float64
