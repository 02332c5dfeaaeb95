"""The golden numbers, and what turns their arrays into the signals of a method. See docs/methods.md for what they are."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.signals import Head, Rows, Signal
from tests.shared import SHARED

FOLDER = Path(os.environ.get("KDBENCH_GOLDEN", SHARED / "golden"))
IGNORED = -100
PRECISIONS = {"f64": torch.float64, "f32": torch.float32}
# Of the published code in float64, which both precisions are held against: relative, and relative to the sum of absolute gradients.
LOSS_TOLERANCE = {"f64": 1e-9, "f32": 1e-5}
GRADIENT_TOLERANCE = {"f64": 1e-8, "f32": 1e-4}
ABSOLUTE = {"f64": 1e-12, "f32": 1e-5}


def loader():
    """The module that comes with the numbers."""
    return _module("golden_loader")


def formula():
    """The module that comes with the numbers and fills models with deterministic weights."""
    return _module("formula")


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(group: str) -> dict:
    """A group's json."""
    return json.loads((FOLDER / f"{group}.json").read_text(encoding="utf-8"))


def inventory() -> dict[str, list[str]]:
    """Every group of the folder with the names of its cases; a case without a name, or a pair of texts, goes by its number."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        content = read(path.stem)
        cases = content["cases"] if "cases" in content else content["predictions"]
        names = [case.get("name", str(i)) if isinstance(case, dict) else str(i) for i, case in enumerate(cases)]
        assert names, f"{path} holds no case"
        assert len(set(names)) == len(names), f"{path} has two cases of one name"
        found[path.stem] = names
    return found


def mark(group: str, *names: str):
    """Tells the summary at the end which cases a test checks."""
    return pytest.mark.golden_case(group, *names)


def _marks(group: str, name: str, counted: bool):
    return [mark(group, name)] if counted else []


def _absent(group: str, arguments: int):
    """A single skipped parameter, where the folder or the group is not there."""
    missing = next(
        (path for name in ("golden_loader.py", f"{group}.json") if not (path := FOLDER / name).exists()), None
    )
    if missing is None:
        return []
    reason = f"no golden numbers: {missing} is absent (KDBENCH_GOLDEN names their folder)"
    return [pytest.param(*[None] * arguments, marks=pytest.mark.skip(reason=reason), id="absent")]


def cases(group: str, counted: bool = True):
    """pytest parameters: every case of a group; a single skipped one where they are absent.

    Args:
        group: its name.
        counted: whether a test is what a case is checked by, for the summary.
    """
    return _absent(group, 1) or [
        pytest.param(case, marks=_marks(group, name, counted), id=name)
        for case, name in zip(read(group)["cases"], inventory()[group], strict=True)
    ]


def whole(group: str):
    """One pytest parameter: everything of a group that is compared at once; a skipped one where it is absent."""
    return _absent(group, 1) or [pytest.param(read(group), marks=mark(group, *inventory()[group]), id=group)]


def parameters(group: str, counted: bool = True):
    """pytest parameters: every case of a group with its arrays, in both precisions; a single skipped one where they are absent.

    Args:
        group, counted: as for `cases`.
    """
    return _absent(group, 3) or [
        pytest.param(
            case, inputs, precision, marks=_marks(group, case["name"], counted), id=f"{case['name']}-{precision}"
        )
        for case, inputs, _ in loader().cases(group)
        for precision in PRECISIONS
    ]


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
    assert_checksum(got, want, GRADIENT_TOLERANCE[precision], ABSOLUTE[precision])


def assert_checksum(got: torch.Tensor, want: dict, relative: float, absolute: float) -> None:
    """A tensor against a published checksum: relative to its sum of absolute values."""
    found = loader().checksum(got.detach().numpy())
    assert loader().close_checksum(found, want, relative, absolute), (found, want)
