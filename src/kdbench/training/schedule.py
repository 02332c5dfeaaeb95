"""The course of the learning rates."""

import math

from kdbench.settings import Training


def rate(step: int, total: int, training: Training) -> float:
    """Share of the peak rate that a step takes: rising from 0 in the warm-up, then falling to `final_rate` after the last step.

    Args:
        step: counted from 0.
        total: steps of the whole training.
        training: `warmup`, `schedule` and `final_rate` of it are read.
    """
    warmup = round(training.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[training.schedule]
    return left if training.schedule == "constant" else training.final_rate + (1 - training.final_rate) * left
