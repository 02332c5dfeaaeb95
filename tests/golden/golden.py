"""The golden numbers, and what turns their arrays into the signals of a method. See docs/methods.md for what they are."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.signals import Head, Rows, Signal
from tests.shared import SHARED

FOLDER = Path(os.environ.get("KDBENCH_GOLDEN", SHARED / "golden"))
needs_golden = pytest.mark.skipif(
    not (FOLDER / "golden_loader.py").exists(),
    reason=f"no golden numbers in {FOLDER}: set KDBENCH_GOLDEN to their folder",
)

IGNORED = -100
PRECISIONS = {"f64": torch.float64, "f32": torch.float32}
# Of the published code in float64, which both precisions are held against: relative, and relative to the sum of absolute gradients.
LOSS_TOLERANCE = {"f64": 1e-9, "f32": 1e-5}
GRADIENT_TOLERANCE = {"f64": 1e-8, "f32": 1e-4}
ABSOLUTE = {"f64": 1e-12, "f32": 1e-5}


def loader():
    """The module that comes with the numbers."""
    spec = importlib.util.spec_from_file_location("golden_loader", FOLDER / "golden_loader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(group: str):
    """pytest parameters: every case of a group in both precisions; a single skipped one without the folder."""
    if not (FOLDER / "golden_loader.py").exists():
        return [pytest.param(None, None, None, marks=needs_golden, id="absent")]
    found = [
        pytest.param(case, inputs, precision, id=f"{case['name']}-{precision}")
        for case, inputs, _ in loader().cases(group)
        for precision in PRECISIONS
    ]
    assert found, f"{FOLDER}/{group}.json holds no case"
    return found


def leaf(array: np.ndarray, precision: str) -> torch.Tensor:
    """A tensor whose gradient is to be compared."""
    return torch.tensor(array, dtype=PRECISIONS[precision], requires_grad=True)


def rows(label: np.ndarray, hidden: torch.Tensor, input_ids: np.ndarray | None = None) -> Rows:
    """Response rows of (B, T) labels and (B, T, d) states; without `input_ids` no row has read anything but token 0."""
    label = torch.tensor(label).long()
    valid = label != IGNORED
    sequence = torch.arange(len(label))[:, None].expand_as(label)[valid]
    inputs = torch.zeros_like(label) if input_ids is None else torch.tensor(input_ids).long()
    return Rows(hidden[valid], label[valid], sequence, valid.sum(1), inputs[valid])


def of_logits(label: np.ndarray, logits: torch.Tensor) -> Signal:
    """A signal whose head hands given (B, T, V) logits through: it is the identity."""
    size = logits.shape[-1]
    return Signal(rows(label, logits), Head(torch.eye(size, dtype=logits.dtype), size), embed=None)


def assert_loss(got, want, precision: str) -> None:
    """A loss or component against the published float64 value."""
    want = float(want)
    assert got.item() == pytest.approx(want, rel=LOSS_TOLERANCE[precision], abs=ABSOLUTE[precision])


def assert_gradient(got: torch.Tensor, want: dict, precision: str) -> None:
    """A gradient against the published checksum."""
    found = loader().checksum(got.detach().numpy())
    assert loader().close_checksum(found, want, GRADIENT_TOLERANCE[precision], ABSOLUTE[precision]), (found, want)
