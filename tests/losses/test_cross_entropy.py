import torch
import torch.nn.functional as F

from kdbench.losses.cross_entropy import correct, cross_entropy, largest_probability


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


def test_gradient_is_that_of_pytorch():
    torch.manual_seed(0)
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.tensor([0, 8, 3, 3, 5]), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad(cross_entropy(logits, targets), logits, upstream)
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="none"), logits, upstream)
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(cross_entropy, (logits, targets))


def test_a_model_that_is_sure_has_its_small_loss_in_float32():
    logits = torch.tensor([[80.0, 70.0, -torch.inf], [-90.0, -100.0, -95.0]])
    exact = F.cross_entropy(logits.double(), torch.zeros(2, dtype=torch.int64), reduction="none")
    found = cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-7)


def test_largest_probability_is_that_of_the_softmax():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3, 5, 1])
    found = largest_probability(logits, targets, cross_entropy(logits, targets))
    torch.testing.assert_close(found, logits.softmax(-1).amax(-1))
