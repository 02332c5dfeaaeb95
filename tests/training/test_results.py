"""What a training leaves: models that others load with nothing of ours, metrics, and a clear word when it cannot go on."""

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from kdbench import files
from kdbench.errors import UserError
from kdbench.training.exports import best
from kdbench.training.run import train
from tests.training import jobs

LORA = {"tuning": "lora", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0}, "select": "last"}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 30)[None]).logits


def test_model_is_plain_hugging_face(models_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(jobs.make_job(tmp_path, models_folder, "dskd", training={"select": "last"}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = AutoModelForCausalLM.from_pretrained(models_folder / "student")
    assert model.dtype == torch.float32
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in before.named_parameters()}
    assert not torch.allclose(logits(model), logits(before), atol=1e-2)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
        == AutoTokenizer.from_pretrained(models_folder / "student").get_vocab()
    )
    model.generate(torch.arange(2, 6)[None], max_new_tokens=3, do_sample=False)
    manifest = files.read_manifest(tmp_path / "model", "model")
    assert (manifest["epoch"], manifest["method"], manifest["tuning"]) == (2, "dskd", "full")


@pytest.mark.parametrize("student", ["student", "untied"])
def test_adapter_is_plain_peft(student, models_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from kdbench import models

    train(jobs.make_job(tmp_path, models_folder, "dskd", student, training=LORA))
    described = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(models_folder / student)
    assert described["target_modules"] == sorted(described["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(described["base_model_name_or_path"])
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "model"))
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.equal(adapted, logits(models.load(tmp_path / "model")))
    assert sum(value.numel() for value in jobs.weights(tmp_path / "model").values()) < 4000
    assert files.read_manifest(tmp_path / "model", "model")["tuning"] == "lora"


def test_adapters_do_not_depend_on_micro_batches(models_folder, tmp_path):
    for size in (2, 100):
        job = jobs.make_job(tmp_path / str(size), models_folder, training=LORA, hardware={"micro_batch_size": size})
        train(job)
    ours, theirs = (jobs.weights(tmp_path / size / "model") for size in ("2", "100"))
    assert all((ours[name] - theirs[name]).abs().max() < 2e-5 for name in theirs)
    assert jobs.metrics(tmp_path / "2") == pytest.approx(jobs.metrics(tmp_path / "100"), rel=5e-6)


@pytest.mark.slow
def test_deepspeed_trains_the_same_adapters(models_folder, tmp_path):
    train(jobs.make_job(tmp_path / "plain", models_folder, training=LORA))
    hardware = {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True}
    jobs.launch_processes(
        output=tmp_path / "zero", folder=models_folder, training=LORA, hardware=hardware, persistent=0
    )
    ours, theirs = (jobs.weights(tmp_path / name / "model") for name in ("zero", "plain"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 2e-5 for name in theirs)
    assert jobs.metrics(tmp_path / "zero") == pytest.approx(jobs.metrics(tmp_path / "plain"), rel=5e-6)


def test_best_epochs_by_dev_loss_of_equals_the_earlier():
    epochs = [{"epoch": number, "dev_loss": loss} for number, loss in enumerate([3.0, 1.0, 2.0, 1.0, 5.0], start=1)]
    assert best(epochs, 3) == [2, 4, 3]
    assert best(epochs, 0) == []


@pytest.mark.parametrize("select", ["dev_loss", "last"])
def test_select_and_keep_best(select, models_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    training = {"epochs": 4, "keep_best": 2, "select": select}
    train(jobs.make_job(tmp_path, models_folder, training=training))
    losses = jobs.metrics(tmp_path, "dev_loss")
    order = sorted(range(1, 5), key=lambda epoch: losses[epoch - 1])
    assert order[0] != 4, "the last epoch must not be the best, or this test tells nothing"
    assert {path.name for path in (tmp_path / "best").iterdir()} == {f"epoch-{epoch}" for epoch in order[:2]}
    chosen = order[0] if select == "dev_loss" else 4
    manifest = files.read_manifest(tmp_path / "model", "model")
    assert manifest["epoch"] == chosen
    assert manifest["dev_loss"] == losses[chosen - 1]
    for folder in (*(tmp_path / "best").iterdir(), tmp_path / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = files.read_manifest(folder, "model")["dev_loss"]
        assert dev_loss(model, jobs.make_job(tmp_path, models_folder).dev) == pytest.approx(expected, rel=1e-6)


def dev_loss(model, tokens):
    """Cross entropy per response token, record by record."""
    total = 0.0
    for row in range(tokens.rows):
        ids = torch.from_numpy(tokens.student.row(row)).long()
        prompt = int(tokens.student.prompt_lengths[row])
        with torch.no_grad():
            found = model.eval()(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        total += torch.nn.functional.cross_entropy(found, ids[prompt:], reduction="sum").item()
    return total / tokens.student.response_counts.sum()


def test_too_small_a_disk_for_checkpoints_is_found_before_the_first_step(models_folder, tmp_path, monkeypatch):
    """Only the free space is made up: a full disk is nothing to make in a test."""
    parameters = 280 * 16 + 64 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16  # embeddings, positions, layers, last norm
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3 * 12 * parameters - 1))
    with pytest.raises(UserError, match=rf"checkpoints {tmp_path}/checkpoints needs .* GB, {tmp_path} has .* GB free"):
        train(jobs.make_job(tmp_path, models_folder))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_without_keep_best_nothing_but_the_model_stays(models_folder, tmp_path):
    train(jobs.make_job(tmp_path, models_folder))
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_all_students_of_a_seed_start_alike_and_see_the_same_records(models_folder, tmp_path):
    for method in ("sft", "vanilla_kd", "dskd"):
        train(jobs.make_job(tmp_path / method, models_folder, method, "dropout", training={"epochs": 1}))
    first = {jobs.metrics(tmp_path / method, "ce")[0] for method in ("sft", "vanilla_kd", "dskd")}
    assert len(first) == 1


def test_groups_and_rates(models_folder):
    from kdbench import methods
    from kdbench.training import engines
    from kdbench.training.run import _distiller

    job = jobs.make_job("unused", models_folder, "dskd")
    method = methods.get("dskd")
    distiller = _distiller(job, method, method.Settings())
    found = engines.groups(distiller, job.training)
    assert [(group["lr"], group["weight_decay"]) for group in found] == [
        (3e-3, 0.05),
        (3e-3, 0.0),
        (5e-3, 0.05),
        (5e-3, 0.0),
    ]
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    undecayed = {names[id(parameter)] for group in found if not group["weight_decay"] for parameter in group["params"]}
    assert all(re.search(r"bias$|ln_\w\.weight$", name) for name in undecayed)
    assert sum(len(group["params"]) for group in found) == len(names)


def test_metrics_and_arguments_tell_all(models_folder, tmp_path):
    job = jobs.make_job(tmp_path, models_folder, "dskd")
    train(job)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"step", "epoch", "loss", "ce", "t2s_ce", "t2s_kd", "s2t_kd"}
    expected |= {"t2s_correct", "s2t_correct", "teacher_entropy"}
    expected |= {"learning_rate", "projector_learning_rate", "gradient_norm", "tokens_per_second", "memory_mb"}
    assert line.keys() == expected
    parts = 0.5 * line["ce"] + 0.5 * (line["t2s_ce"] + line["t2s_kd"] + line["s2t_kd"])
    assert line["loss"] == pytest.approx(parts, rel=1e-6)
    assert json.loads((tmp_path / "config.json").read_text()) == job.identity | {"seed": job.seed}
    arguments = json.loads((tmp_path / "args.json").read_text())
    assert arguments["method_settings"]["temperature"] == 2.0
    assert arguments["hardware"]["micro_batch_size"] == 3
    assert arguments["versions"]["torch"] == torch.__version__


NOT_FINITE = r"step \d+, method sft: not finite: ce of records 3; loss of records 3 .*(step-\d+|no checkpoint)"
STEP_BY_STEP = {"training": {"batch_size": 2}, "hardware": {"micro_batch_size": 1, "checkpoint_seconds": 0}}


def test_a_loss_that_is_no_number_names_step_component_and_records(models_folder, tmp_path):
    job = jobs.poisoned(jobs.make_job(tmp_path, models_folder, student="broken", **STEP_BY_STEP))
    with pytest.raises(UserError, match=NOT_FINITE):
        train(job)
    assert re.search(NOT_FINITE, (tmp_path / "train.log").read_text())
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_all_processes(models_folder, tmp_path):
    options = {"output": tmp_path, "folder": models_folder, "student": "broken", "poison": True, "expected": 1}
    said = jobs.launch_processes(**options, **STEP_BY_STEP)
    assert len(re.findall(f"UserError: {NOT_FINITE}", said)) == 2, "each of the two processes says the same"


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(models_folder, tmp_path, monkeypatch):
    from kdbench.training import engines

    original = engines.Plain.backward
    calls = 0

    def backward(self, loss):
        nonlocal calls
        calls += 1
        original(self, loss * torch.inf if calls == 5 else loss)

    monkeypatch.setattr(engines.Plain, "backward", backward)
    job = jobs.make_job(tmp_path, models_folder, hardware={"micro_batch_size": 100, "checkpoint_seconds": 0})
    with pytest.raises(UserError, match=r"step 5, method sft: not finite: gradient of records .*step-4"):
        train(job)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": None}, "needs a teacher's signal"),
        ({"dev": jobs.make_tokens(1, 1)}, None),
        ({"student": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_jobs_that_cannot_work(changed, message, models_folder, tmp_path):
    job = replace(jobs.make_job(tmp_path, models_folder, "vanilla_kd", training={"epochs": 1}), **changed)
    if message is None:
        train(job)
    else:
        with pytest.raises(UserError, match=message):
            train(job)


@pytest.mark.slow
def test_bf16_at_stage_0_is_refused_with_a_reason(models_folder, tmp_path):
    options = {"training": {"precision": "bf16"}, "hardware": {"engine": "deepspeed", "zero_stage": 0}}
    said = jobs.launch_processes(processes=0, expected=1, output=tmp_path, folder=models_folder, **options)
    assert "UserError: hardware.zero_stage 0 with training.precision bf16" in said


def test_wrong_number_of_processes(models_folder, tmp_path):
    with pytest.raises(UserError, match="start the training with torchrun --nproc_per_node 3"):
        train(jobs.make_job(tmp_path, models_folder, hardware={"processes": 3}))


def test_gpus_that_are_not_there(models_folder, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    with pytest.raises(UserError, match=r"hardware.gpus: 1, but process 1 of this machine finds 0 GPUs"):
        train(jobs.make_job(tmp_path, models_folder, hardware={"gpus": 1}))
