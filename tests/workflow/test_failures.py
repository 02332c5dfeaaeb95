"""Failures, kills and second runs: nothing stale is left, nothing is done twice, nothing differs."""

import os
import signal
import time

import pytest

from tests.workflow.test_reruns import evaluation

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

ONE = "results/cross/methods/uld/table.csv"
WEIGHTS = "results/cross/methods/uld/seed1/model/model.safetensors"


def test_failed_retraining_leaves_no_table_and_is_all_that_is_retried(workflow):
    workflow.change("methods", "uld", {"alignment": "byte", "kd_rate": 1e38})  # a loss that is not finite
    workflow.change("methods", "vanilla_kd", {"objective": ["forward_kl", "reverse_kl"], "kd_rate": 0.4})
    code, output = workflow.run()
    assert code != 0
    assert "Failed: distill" in output
    assert "not finite" in output
    assert not (workflow.folder / "results/table.csv").exists()
    group = "cross/methods/uld"
    failed = {"distill cross uld 1", f"collect_scores {group}", "aggregate"} | evaluation(f"{group}/seed1")
    assert workflow.planned() == failed, "other methods went on, and the failed one is tried again"
    workflow.change("methods", "uld", {"alignment": "byte"})
    workflow.succeed()
    table = (workflow.folder / "results/table.csv").read_text()
    assert table.count("\n") == 1 + 2 + 4 + 2


def test_result_does_not_depend_on_cores(untouched, finished, tmp_path):
    untouched.succeed(ONE, cores=1)
    many = finished.copy(tmp_path / "many")
    many.succeed(ONE, cores=8)
    for path in (ONE, "results/cross/methods/uld/scores.csv", WEIGHTS):
        assert (untouched.folder / path).read_bytes() == (many.folder / path).read_bytes(), path


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def test_second_snakemake_is_refused_and_a_killed_one_is_no_obstacle(untouched, finished):
    """SIGKILL of Snakemake alone while it trains; the next run needs no --unlock and ends in the same weights."""
    untouched.change("hardware", {"checkpoint_seconds": 0})
    running = untouched.start(ONE, "--cores", "2", stdout=-3, stderr=-3)
    log = untouched.folder / "results/teachers/tutor/metrics.jsonl"
    wait_for(log.exists)
    code, output = untouched.run(ONE)
    assert code != 0
    assert f"this folder is in use by process {running.pid}" in output
    assert "Traceback" not in output
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    untouched.succeed(ONE)
    assert (untouched.folder / WEIGHTS).read_bytes() == (finished.folder / WEIGHTS).read_bytes()


def test_bad_configuration_is_one_line(untouched):
    untouched.change("experiments", "cross", "methods", ["sft", "uldd"])
    code, output = untouched.run("--dry-run")
    assert code != 0
    assert "config: experiments.cross.methods[1]: 'uldd' is not one of `methods`; did you mean 'uld'?" in output
    assert "Traceback" not in output
