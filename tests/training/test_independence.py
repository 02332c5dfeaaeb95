"""A training's numbers do not depend on how its work is cut and spread. Gradient norms tell a wrong scale, which AdamW's weights hide."""

import json
from dataclasses import replace

import pytest
import torch

from kdbench import files, packing, teacher
from kdbench.teacher import cached
from kdbench.training.run import train
from tests.training import jobs

LAST = {"select": "last"}


def assert_same(output, reference, weights=2e-5, norms=5e-6) -> None:
    """Gradient norms of all steps, dev losses and the final weights.

    But for the bias of the keys: it shifts all scores of a query alike, so its gradient is 0 up to round-off, of which AdamW makes steps of
    full length.
    """
    for key in ("gradient_norm", "loss", "dev_loss"):
        assert jobs.metrics(output, key) == pytest.approx(jobs.metrics(reference, key), rel=norms), key
    ours, theirs = (jobs.weights(folder / "model") for folder in (output, reference))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name] - value).abs()
        if name.endswith("c_attn.bias"):
            difference[16:32] = 0.0  # keys
        if not name.endswith("k_proj.bias"):
            assert difference.max().item() <= weights, name


@pytest.fixture(scope="module")
def reference(models_folder, tmp_path_factory):
    """One process, each step in a single forward pass; by method and student, made when it is first asked for."""
    made = {}

    def of(method, student="student", **training):
        key = (method, student, *sorted(training.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("reference")
            hardware = {"micro_batch_size": 100}
            train(jobs.make_job(made[key], models_folder, method, student, LAST | training, hardware))
        return made[key]

    return of


@pytest.mark.parametrize("method", list(jobs.METHODS))
def test_micro_batches(method, reference, models_folder, tmp_path):
    for size in (1, 3, 5):
        output = tmp_path / str(size)
        train(jobs.make_job(output, models_folder, method, training=LAST, hardware={"micro_batch_size": size}))
        assert_same(output, reference(method))


@pytest.mark.parametrize("method", ["vanilla_kd", "uld-byte"])
def test_a_cache_stands_for_the_teacher(method, reference, models_folder, tmp_path):
    """All that is left of the teacher is its manifest: a training that would read its weights finds none."""
    job = jobs.make_job(tmp_path / "run", models_folder, method, training=LAST)
    known = {"teacher_fingerprint": "of-the-teacher", "tokens_fingerprint": "of-the-tokens"}
    live = job.teacher(torch.device("cpu"))
    cached.write(tmp_path / "cache", live.model, live.size, job.train.teacher, "float32", 5, **known)
    files.write_json(tmp_path / "teacher/manifest.json", {"fingerprint": "of-the-teacher"})
    source, shape = teacher.from_cache(tmp_path / "cache", tmp_path / "teacher", "of-the-tokens")
    assert shape == job.teacher_shape
    train(replace(job, teacher=source, teacher_shape=shape))
    assert_same(tmp_path / "run", reference(method))


@pytest.mark.parametrize(("method", "student"), [("vanilla_kd", "student"), ("uld", "student"), ("sft", "untied")])
def test_packed_and_padded_batches(method, student, reference, models_folder, tmp_path, monkeypatch):
    """Student and teacher without padding, as everywhere else here, against the way of architectures that cannot be packed."""
    packed = reference(method, student)
    assert "cannot read packed batches" not in (packed / "train.log").read_text()
    monkeypatch.setattr(packing, "enable", lambda transformer: False)
    train(jobs.make_job(tmp_path, models_folder, method, student, LAST, {"micro_batch_size": 100}))
    assert "cannot read packed batches" in (tmp_path / "train.log").read_text()
    assert_same(tmp_path, packed)


def test_micro_batches_by_tokens(reference, models_folder, tmp_path):
    hardware = {"micro_batch_size": 100, "micro_batch_tokens": 40}
    train(jobs.make_job(tmp_path, models_folder, "vanilla_kd", training=LAST, hardware=hardware))
    assert_same(tmp_path, reference("vanilla_kd"))


def test_gradient_checkpointing(reference, models_folder, tmp_path):
    hardware = {"gradient_checkpointing": True}
    train(jobs.make_job(tmp_path, models_folder, "vanilla_kd", training=LAST, hardware=hardware))
    assert_same(tmp_path, reference("vanilla_kd"))


def test_loss_is_the_mean_over_response_tokens_of_the_global_batch(reference, models_folder):
    """The first step's loss from whole logits, record by record."""
    from transformers import AutoModelForCausalLM

    from kdbench.data import batches

    job = jobs.make_job("unused", models_folder)
    (rows, *_) = batches.schedule(job.train.student.rows, 8, epoch=0, seed=job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.student)
    total = count = 0.0
    for row in rows:
        ids = torch.from_numpy(job.train.student.row(row)).long()
        prompt = int(job.train.student.prompt_lengths[row])
        logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="sum")
        count += len(ids) - prompt
    (total / count).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    output = reference("sft")
    assert jobs.metrics(output, "loss")[0] == pytest.approx((total / count).item(), rel=1e-6)
    assert jobs.metrics(output)[0] == pytest.approx(norm, rel=1e-5)


def test_bf16_is_near_fp32(reference, models_folder, tmp_path):
    train(jobs.make_job(tmp_path, models_folder, "dskd", training=LAST | {"precision": "bf16"}))
    assert jobs.metrics(tmp_path, "loss") == pytest.approx(jobs.metrics(reference("dskd"), "loss"), rel=5e-3)
    assert jobs.metrics(tmp_path) == pytest.approx(jobs.metrics(reference("dskd")), rel=3e-2)
    assert {value.dtype for value in jobs.weights(tmp_path / "model").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dskd", "uld-byte", "mcw_kd"])
def test_two_processes(method, reference, models_folder, tmp_path):
    jobs.launch_processes(output=tmp_path, folder=models_folder, method=method, training=LAST)
    assert_same(tmp_path, reference(method))
    assert json.loads((tmp_path / "args.json").read_text())["world"] == 2
    if method == "mcw_kd":  # the weights of its costs are those of the whole batch in either process
        for cost in ("alpha_logits_kl", "alpha_hidden_context"):
            path, alone = (jobs.metrics(output, cost) for output in (tmp_path, reference(method)))
            assert path == pytest.approx(alone, rel=1e-4)
            assert len(set(path)) > 2


@pytest.mark.slow
def test_more_processes_than_records_in_the_last_batch(models_folder, tmp_path):
    """21 records in batches of 4 leave one for the last step of an epoch; the other process works for nothing, but works."""
    options = {"folder": models_folder, "training": LAST | {"batch_size": 4}, "rows": 21}
    train(jobs.make_job(tmp_path / "one", method="vanilla_kd", **options))
    jobs.launch_processes(output=tmp_path / "two", method="vanilla_kd", **options)
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "method"),
    [(0, "sft"), (1, "dskd"), (2, "vanilla_kd"), (2, "mcw_kd"), (3, "uld-byte"), (3, "dskd_eta"), (3, "mcw_kd")],
)
def test_deepspeed_two_processes(stage, method, reference, models_folder, tmp_path):
    hardware = {"engine": "deepspeed", "zero_stage": stage}
    jobs.launch_processes(
        output=tmp_path, folder=models_folder, method=method, training=LAST, hardware=hardware, persistent=0
    )
    assert_same(tmp_path, reference(method))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["student", "untied"])
def test_sharded_heads(student, reference, models_folder, tmp_path):
    """Tied and untied heads, whose weights the losses read, with recomputed activations; fine-tuning, where nothing else hides an error."""
    hardware = {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True}
    jobs.launch_processes(
        output=tmp_path, folder=models_folder, student=student, training=LAST, hardware=hardware, persistent=0
    )
    assert_same(tmp_path, reference("sft", student))


@pytest.mark.slow
def test_deepspeed_bf16(reference, models_folder, tmp_path):
    training = LAST | {"precision": "bf16"}
    hardware = {"engine": "deepspeed", "zero_stage": 2}
    jobs.launch_processes(
        processes=0, output=tmp_path, folder=models_folder, method="dskd", training=training, hardware=hardware
    )
    assert jobs.metrics(tmp_path, "loss") == pytest.approx(jobs.metrics(reference("dskd"), "loss"), rel=5e-3)
    assert jobs.metrics(tmp_path) == pytest.approx(jobs.metrics(reference("dskd")), rel=3e-2)
    assert {value.dtype for value in jobs.weights(tmp_path / "model").values()} == {torch.float32}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
