"""Golden numbers of another folder: further cases are run and counted without a change, and nothing is left out without a word."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.golden import golden
from tests.shared import ROOT

GROUP, TEST = "universal_logit_distillation", "tests/golden/test_uld.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (golden.FOLDER / f"{GROUP}.json").exists(), reason=f"{golden.FOLDER}: no golden numbers"),
]


@pytest.fixture
def folder(tmp_path):
    """One group with one case more, a copy of its first under another name."""
    shutil.copy(golden.FOLDER / "golden_loader.py", tmp_path)
    shutil.copytree(golden.FOLDER / GROUP, tmp_path / GROUP)
    content = golden.read(GROUP)
    content["cases"].append(content["cases"][0] | {"name": "another_name"})
    (tmp_path / f"{GROUP}.json").write_text(json.dumps(content))
    return tmp_path


def run(folder, *arguments):
    """Exit status and output of a run as `make test-golden` makes it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--every-case", *arguments],
        cwd=ROOT,
        env=os.environ | {"KDBENCH_GOLDEN": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_one_more_case_is_one_more_case(folder):
    number = len(golden.inventory()[GROUP]) + 1
    status, said = run(folder, "tests/golden/test_uld.py", "tests/golden/test_dskd.py")
    assert status == 0, said
    assert f"{GROUP}: {number} cases: {number} passed" in said
    assert f"\n{number} cases passed" in said  # the groups that the folder does not have are none of its business


def test_a_wrong_number_fails(folder):
    content = json.loads((folder / f"{GROUP}.json").read_text())
    content["cases"][-1]["expected"]["as_published_code"]["f64"]["components"]["uld_loss"] += 0.01
    (folder / f"{GROUP}.json").write_text(json.dumps(content))
    status, said = run(folder, TEST)
    assert status == 1
    assert f"{GROUP}: {len(content['cases'])} cases: {len(content['cases']) - 1} passed, 1 failed" in said


@pytest.mark.parametrize("processes", [[], ["-n", "1"]])
def test_what_is_not_checked_is_an_error(folder, processes):
    status, said = run(folder, TEST, "--deselect", f"{TEST}::test_loss_components_and_gradients[another_name-f64]",
                       "--deselect", f"{TEST}::test_loss_components_and_gradients[another_name-f32]", *processes)  # fmt: skip
    assert status == 1
    assert f"error: {GROUP}: another_name was not checked" in said
    (folder / "unheard_of.json").write_text(json.dumps({"group": "unheard_of", "cases": [{"name": "one"}]}))
    status, said = run(folder, TEST, *processes)
    assert status == 1
    assert "error: unheard_of: no test checks this group" in said
    assert "passed" in said


def test_a_folder_without_numbers_is_an_error(tmp_path):
    status, said = run(tmp_path, TEST)
    assert status == 1
    assert f"error: {tmp_path} holds no golden numbers" in said
