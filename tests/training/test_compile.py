"""`hardware.compile`: it changes no result beyond round-off and no name in a file, and says what it needs."""

import pytest

from kdbench import models
from kdbench.errors import UserError
from kdbench.training.run import train
from tests.training import jobs
from tests.training.test_independence import assert_same


def test_a_missing_compiler_is_told(models_folder, monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r"hardware\.compile: this machine has no C\+\+ compiler"):
        models.compile_body(models.load(models_folder / "student"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_a_compiled_training_is_the_plain_one(engine, models_folder, tmp_path):
    """Interrupted half way and ended without compiling, too: nothing in a checkpoint or a model tells."""
    hardware = {"micro_batch_size": 8, "checkpoint_seconds": 0.0}
    options = {"training": {"epochs": 1, "select": "last"}, "rows": 24, "folder": models_folder}
    train(jobs.make_job(tmp_path / "plain", hardware=hardware, **options))

    options |= {"output": tmp_path / "run", "processes": 1}
    hardware |= {"engine": engine}
    jobs.launch_processes(hardware=hardware | {"compile": True}, stop_in=[0, 1], expected=1, **options)
    assert len(jobs.metrics(tmp_path / "run")) == 2  # of three steps; the signal of the first is seen in the second
    jobs.launch_processes(hardware=hardware, **options)
    assert_same(tmp_path / "run", tmp_path / "plain")
