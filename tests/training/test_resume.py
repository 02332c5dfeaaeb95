"""A training that was interrupted, by whatever, ends with the very weights of one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from kdbench.errors import UserError
from kdbench.training import engines
from kdbench.training.run import train
from tests.shared import ROOT
from tests.training import jobs
from tests.training.jobs import launch_processes

# Dropout, so that a random number out of place shows; a method with weights of its own.
OPTIONS = {
    "method": "dskd",
    "student": "dropout",
    "training": {"epochs": 2, "keep_best": 2},
    "hardware": {"checkpoint_seconds": 0.0},
}


@pytest.fixture(scope="module")
def uninterrupted(models_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    train(jobs.make_job(output, models_folder, **OPTIONS))
    return output


@pytest.fixture
def stop_before(monkeypatch):
    """Ends a training by an exception, or a signal, in its n-th optimizer step."""
    original = engines.Plain.step

    def of(count, what):
        left = count

        def step(self, rate):
            nonlocal left
            left -= 1
            if left == 0:
                what()
            return original(self, rate)

        monkeypatch.setattr(engines.Plain, "step", step)

    return of


class Crash(Exception):
    pass


def crash():
    raise Crash


def assert_equal(output, reference):
    """Bit for bit: the model, the epochs that were kept, and what was measured on the way."""
    for folder in ("model", "best/epoch-1", "best/epoch-2"):
        ours, theirs = jobs.weights(output / folder), jobs.weights(reference / folder)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), folder
        assert (output / folder / "manifest.json").read_text() == (reference / folder / "manifest.json").read_text()
    for key in ("step", "learning_rate", "loss", "gradient_norm", "dev_loss"):
        assert jobs.metrics(output, key) == jobs.metrics(reference, key), key


def interrupted(output, folder, stop_before, step, what=crash):
    stop_before(step, what)
    with pytest.raises(Crash):
        train(jobs.make_job(output, folder, **OPTIONS))
    stop_before(-1, what)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_crash_in_any_step(step, models_folder, uninterrupted, stop_before, tmp_path):
    interrupted(tmp_path, models_folder, stop_before, step)
    train(jobs.make_job(tmp_path, models_folder, **OPTIONS))
    assert_equal(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_ends_the_step_writes_a_checkpoint_and_exits_75(
    number, models_folder, uninterrupted, stop_before, tmp_path
):
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    patient = OPTIONS | {"hardware": {"checkpoint_seconds": 1000.0}}
    stop_before(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        train(jobs.make_job(tmp_path, models_folder, **patient))
    assert stopped.value.code == 75
    # the signal came after this step's agreement, so one more step is made
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert number.name in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "model").exists()
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    stop_before(-1, crash)
    train(jobs.make_job(tmp_path, models_folder, **patient))
    assert_equal(tmp_path, uninterrupted)
    log = (tmp_path / "train.log").read_text()
    assert log.count("trains ") == 2
    assert "goes on after step 3 of 6" in log


def test_a_jobs_time_limit_stops_like_a_signal(models_folder, tmp_path, monkeypatch):
    """A `squeue` that names an end in 10 s: nothing but one step at a time fits before it."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ndate -d '+10 seconds' +%Y-%m-%dT%H:%M:%S\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as stopped:
        train(jobs.make_job(tmp_path / "run", models_folder))
    assert stopped.value.code == 75
    assert "time limit" in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "step-1").exists()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one bit of the weights": lambda folder: _flip(folder / "state.pt"),
    "the end cut off": lambda folder: os.truncate(folder / "state.pt", 1000),
    "a file missing": lambda folder: (folder / "state.pt").unlink(),
    "the position cut off": lambda folder: os.truncate(folder / "state.json", 20),
    "the position missing": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back_to_the_one_before(damage, models_folder, uninterrupted, stop_before, tmp_path):
    interrupted(tmp_path, models_folder, stop_before, 6)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-5"]
    DAMAGES[damage](tmp_path / "checkpoints" / "step-5")
    train(jobs.make_job(tmp_path, models_folder, **OPTIONS))
    assert_equal(tmp_path, uninterrupted)
    log = (tmp_path / "train.log").read_text()
    assert "step-5 is not used: it is damaged" in log
    assert "goes on after step 4 of 6" in log


def test_an_epoch_that_lost_is_kept_as_long_as_a_checkpoint_needs_it(models_folder, stop_before, tmp_path):
    def job(name):
        made = jobs.make_job(tmp_path / name, models_folder, **OPTIONS | {"training": {"epochs": 3}})
        return replace(made, dev=made.train)  # so that every epoch is better than the one before

    train(job("whole"))
    losses = jobs.metrics(tmp_path / "whole", "dev_loss")
    assert losses == sorted(losses, reverse=True)
    stop_before(7, crash)
    with pytest.raises(Crash):
        train(job("run"))
    assert sorted(path.name for path in (tmp_path / "run" / "best").iterdir()) == ["epoch-1", "epoch-2"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    stop_before(-1, crash)
    train(job("run"))
    ours, theirs = (jobs.weights(tmp_path / run / "model") for run in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 6}, {"training": {"epochs": 2, "keep_best": 2, "learning_rate": 1e-4}}, {"method": "vanilla_kd"}],
)
def test_checkpoints_of_another_identity_are_not_used(changed, models_folder, stop_before, tmp_path):
    interrupted(tmp_path / "run", models_folder, stop_before, 5)
    train(jobs.make_job(tmp_path / "run", models_folder, **OPTIONS | changed))
    train(jobs.make_job(tmp_path / "fresh", models_folder, **OPTIONS | changed))
    assert_equal(tmp_path / "run", tmp_path / "fresh")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step-4 is not used: it belongs to another configuration" in log
    assert "goes on" not in log


def test_other_micro_batches_go_on_from_the_same_checkpoint(models_folder, uninterrupted, stop_before, tmp_path):
    interrupted(tmp_path, models_folder, stop_before, 5)
    train(jobs.make_job(tmp_path, models_folder, **OPTIONS | {"hardware": {"micro_batch_size": 100}}))
    assert "goes on after step 4" in (tmp_path / "train.log").read_text()
    assert jobs.metrics(tmp_path, "step") == jobs.metrics(uninterrupted, "step")


def test_nothing_is_left_behind(uninterrupted):
    found = sorted(path.name for path in uninterrupted.iterdir())
    assert found == [".lock", "args.json", "best", "config.json", "metrics.jsonl", "model", "train.log"]


def test_the_second_training_of_a_run_is_told_who_has_it(models_folder, tmp_path):
    code = "import sys, time; from kdbench.locks import Lock; lock = Lock(sys.argv[1], 'x'); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"the training of .* is in use by process {holder.pid} on .+ since "):
            train(jobs.make_job(tmp_path, models_folder))
        assert not (tmp_path / "config.json").exists()
    finally:
        holder.kill()
        holder.wait()
    train(jobs.make_job(tmp_path, models_folder, training={"epochs": 1}))
    assert (tmp_path / "model" / "manifest.json").exists()


def launch(output, folder, **options):
    options |= {"output": str(output), "folder": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.jobs", json.dumps(options)], cwd=ROOT, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_kill_9_in_the_middle_of_writing(models_folder, uninterrupted, tmp_path):
    """Killed at the 1st to 12th of the moments when a file is about to be on disk for good, again and again until nothing is left to do."""
    draw = random.Random(1)
    ends = []
    while not ends or ends[-1] != 0:
        assert len(ends) < 20
        ends.append(launch(tmp_path, models_folder, kill_after=draw.randint(8, 24), **OPTIONS).wait())
    assert ends.count(-signal.SIGKILL) >= 2
    assert_equal(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_two_processes_stop_together_and_go_on(engine, models_folder, tmp_path):
    """A signal to one process stops both after the same step; the dropout of each goes on as if nothing had happened."""
    options = OPTIONS | {"folder": models_folder, "hardware": {"engine": engine, "zero_stage": 2}}
    launch_processes(output=tmp_path / "whole", **options)
    launch_processes(
        output=tmp_path / "run", stop_in=[1, 2], expected=1, **options
    )  # torchrun turns every failure into 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    launch_processes(output=tmp_path / "run", **options)
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mcw_kd", "dskd_eta"])
def test_what_a_method_adapts_goes_on(method, models_folder, tmp_path):
    """Two processes, stopped between two updates of what is adapted without gradient."""
    options = OPTIONS | {"folder": models_folder, "method": method}
    launch_processes(output=tmp_path / "whole", **options)
    launch_processes(output=tmp_path / "run", stop_in=[1, 3], expected=1, **options)
    launch_processes(output=tmp_path / "run", **options)
    assert_equal(tmp_path / "run", tmp_path / "whole")
    for key in {"mcw_kd": ("alpha_logits_kl", "alpha_hidden_context"), "dskd_eta": ("t2s_agreement",)}[method]:
        assert jobs.metrics(tmp_path / "run", key) == jobs.metrics(tmp_path / "whole", key)


@pytest.mark.slow
def test_kill_9_at_any_time(models_folder, tmp_path):
    options = OPTIONS | {"training": {"epochs": 12, "keep_best": 2}, "hardware": {"checkpoint_seconds": 0.05}}
    train(jobs.make_job(tmp_path / "whole", models_folder, **options))
    draw = random.Random(2)
    run = tmp_path / "run"
    for target in sorted(draw.sample(range(2, 34), 3)):
        process = launch(run, models_folder, **options)
        while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(jobs_lines(run)) < target):
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert launch(run, models_folder, **options).wait() == 0
    ours, theirs = (jobs.weights(of / "model") for of in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for key in ("step", "loss", "gradient_norm", "dev_loss"):
        assert jobs.metrics(run, key) == jobs.metrics(tmp_path / "whole", key), key


def jobs_lines(run):
    return (run / "metrics.jsonl").read_text().splitlines()
