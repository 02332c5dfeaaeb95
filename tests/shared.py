"""Where tests find the data and tokenizers that are no part of the project."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("KDBENCH_SHARED") or ROOT.parent / "shared")

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason=f"{SHARED} is absent (set KDBENCH_SHARED to the folder of shared data and tokenizers)"
)
