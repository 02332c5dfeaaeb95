"""What is told of a run, from the files that trainings really write."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdbench import files, status
from kdbench.locks import Lock
from kdbench.training.progress import Progress

EVALUATIONS = ["evaluation/test/decode10", "evaluation/shift/decode10"]
NAME = "pair/methods/uld/seed1"
PLAN = {"runs": [NAME], "fetched": [], "evaluations": EVALUATIONS}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results" / NAME).mkdir(parents=True)
    return tmp_path / "results"


def train(results: Path, steps: int, total: int = 1500) -> Progress:
    """As a training reports the first so many steps, 2 s each."""
    progress = Progress(results / NAME, 0, torch.device("cpu"))
    progress.say("trains resources/models/small by uld (run 1, seed 1)")
    progress.begin(0, total)
    for step in range(1, steps + 1):
        progress.step(
            {"step": step, "epoch": 1, "loss": 9.0 / step, "gradient_norm": 1.0, "tokens_per_second": 5.0}, total
        )
    return progress


def state(results: Path) -> status.Run:
    return status.state_of(results, NAME, PLAN)


def test_from_waiting_to_done(results):
    assert state(results).state == "waiting"
    lock = Lock(results / NAME / ".lock", "the run")
    progress = train(results, 0)
    assert (state(results).state, state(results).detail) == ("training", "starts")
    progress.close()
    train(results, 3).close()
    assert state(results).detail == "step 3 of 1,500 (0%), loss 3.0000"
    lock.release()
    files.write_json(results / NAME / "model/manifest.json", {})
    assert (state(results).state, state(results).detail) == ("evaluating", "0 of 2 sets of answers have scores")
    for of in EVALUATIONS:
        files.write_json(results / NAME / of / "scores.json", {})
    assert state(results) == status.Run(NAME, "done")


def test_remaining_time_is_that_of_this_attempt(results):
    lock = Lock(results / NAME / ".lock", "the run")
    (results / NAME / "train.log").write_text(
        "2026-01-01T00:00:00+00:00 trains a by uld\n"
        "2026-01-01T00:00:00+00:00 step 1/1000, epoch 1: loss 5.0\n"
        "2026-01-05T00:00:00+00:00 trains a by uld\n"
        "2026-01-05T00:00:00+00:00 step 100/1000, epoch 1: loss 2.0\n"
        "2026-01-05T00:05:00+00:00 step 400/1000, epoch 2: loss 1.0\n"
    )
    assert state(results).detail == "step 400 of 1,000 (40%), 10 min left"
    lock.release()


def test_a_training_without_a_living_process_has_stopped(results):
    train(results, 2).close()
    assert state(results).state == "stopped"  # it never had a lock
    script = f"from kdbench.locks import Lock; Lock({str(results / NAME / '.lock')!r}, 'the run'); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert state(results).state == "training"
    holder.kill()
    holder.wait()
    found = state(results)
    assert found.state == "stopped"
    assert found.detail.startswith("step 1/1500, epoch 1")


def test_another_process_of_the_same_number_is_not_taken_for_the_training(results):
    train(results, 2).close()
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": "2020-01-01T00:00:00+00:00"}
    files.write_json(results / NAME / ".lock", holder)
    assert state(results).state == "stopped"


def test_a_training_on_another_machine_lives_while_it_writes(results):
    train(results, 2).close()
    files.write_json(results / NAME / ".lock", {"host": "node7", "process": 1, "since": "2026-01-01T00:00:00+00:00"})
    assert state(results).state == "training"
    assert state(results).detail.endswith(", on node7")
    old = time.time() - 3600
    os.utime(results / NAME / "train.log", (old, old))
    assert state(results).state == "stopped"


def test_a_teacher_that_is_not_trained_here(results):
    """Its model lies elsewhere; what it has here are answers."""
    plan = PLAN | {"runs": ["teachers/tuned"], "fetched": ["teachers/tuned"]}
    assert status.state_of(results, "teachers/tuned", plan) == status.Run(
        "teachers/tuned", "waiting", "not trained here"
    )
    files.write_json(results / "teachers/tuned" / EVALUATIONS[0] / "scores.json", {})
    assert status.state_of(results, "teachers/tuned", plan).state == "evaluating"
    files.write_json(results / "teachers/tuned" / EVALUATIONS[1] / "scores.json", {})
    assert status.state_of(results, "teachers/tuned", plan).state == "done"


def test_lines_that_are_being_written_do_no_harm(results):
    lock = Lock(results / NAME / ".lock", "the run")
    train(results, 2).close()
    with open(results / NAME / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert "loss 4.5000" in state(results).detail
    lock.release()


def test_report(results):
    train(results, 2).close()
    plan = PLAN | {"runs": [NAME, "pair/methods/mcw_kd/seed1", "teachers/big"]}
    files.write_json(results / "teachers/big/model/manifest.json", {})
    lines = status.report(results, plan).splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["stopped", "waiting", "evaluating"]
    assert lines[3] == "0 of 3 done, 1 evaluating, 1 stopped, 1 waiting"
    assert " GB free" in lines[4]


def test_command(results, monkeypatch):
    command = [sys.executable, "-m", "kdbench.status", "--directory", str(results.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no run has begun in this folder" in done.stderr
    monkeypatch.chdir(results.parent)
    status.write_plan(PLAN)
    assert json.loads(status.PLAN.read_text())["runs"] == [NAME]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}  waiting\n0 of 1 done, 1 waiting\n")
