import itertools
import math

import pytest

from kdbench.settings import Training
from kdbench.training.schedule import rate


def curve(total=100, **settings):
    training = Training(**settings)
    return [rate(step, total, training) for step in range(total)]


def test_warmup_rises_from_0_to_the_peak():
    rates = curve(warmup=0.1)
    assert rates[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert max(rates) == rates[10] == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_and_linear_end_at_the_final_rate(final):
    for schedule, half in (("cosine", 0.5 * (1 + math.cos(math.pi / 2))), ("linear", 0.5)):
        rates = curve(schedule=schedule, final_rate=final)
        assert rates[0] == 1.0
        assert rates[50] == pytest.approx(final + (1 - final) * half)
        assert rate(100, 100, Training(schedule=schedule, final_rate=final)) == pytest.approx(final)
        assert all(earlier > later for earlier, later in itertools.pairwise(rates))


def test_cosine_equals_that_of_transformers_but_for_the_first_step():
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 20, 100)
    ours = curve(warmup=0.2)
    for step in range(100):
        if step >= 20:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_constant_stays():
    assert curve(schedule="constant", warmup=0.05)[5:] == [1.0] * 95
