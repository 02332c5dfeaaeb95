"""The embedded experiment from nothing: what its table may be relied on to show (and only that: the order of distilled students is not)."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest

from tests.workflow.conftest import ROOT

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_orderings_of_the_embedded_experiment(untouched):
    shutil.copy2(ROOT / "config/config.yaml", untouched.folder / "config/config.yaml")
    untouched.succeed(timeout=3600)
    table = pd.read_csv(untouched.folder / "results/table.csv", keep_default_na=False)
    assert list(table.columns[:4]) == ["experiment", "method", "student", "teacher"]
    same, cross = (
        table[table["experiment"] == name].set_index("method") for name in ("same_tokenizer", "cross_tokenizer")
    )
    for of in (same, cross):
        assert of.loc["teacher", "test"] - of.loc["sft", "test"] > 8
        assert of.loc["seqkd", "test"] - of.loc["sft", "test"] > 5
        assert of.loc["seqkd", "shift"] > of.loc["sft", "shift"]
    assert same.loc["vanilla_kd", "test"] - same.loc["sft", "test"] > 2
    assert same.loc["vanilla_kd", "shift"] > same.loc["sft", "shift"]
    assert same.loc["dskd", "test"] > same.loc["sft", "test"]
    assert "Nothing to be done" in untouched.succeed()
    told = subprocess.run(
        [sys.executable, "-m", "kdbench.status", "--directory", untouched.folder], capture_output=True, text=True
    )
    assert "\n8 of 8 done\n" in told.stdout
