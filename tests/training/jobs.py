"""Small but complete trainings: real models in real folders, random records. Also a program, for tests that need processes of their own."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdbench import models
from kdbench.alignment.pairs import Alignment
from kdbench.alignment.spelling import Spelling
from kdbench.data.tokens import Tokens, TokenSide
from kdbench.methods.base import Shape
from kdbench.settings import Hardware, InitModel, TrainedTokenizer, Training
from kdbench.teacher.live import Live
from kdbench.training import engines
from kdbench.training.job import Job
from kdbench.training.run import train
from tests.methods import relations
from tests.shared import ROOT

TEXTS = ["the red cat sat on the mat and saw another red cat", "a dog ran after the ball over the hill"] * 20
VOCABULARY = 280
TEACHER_VOCABULARY = 290
ROWS, DEV_ROWS = 22, 7
POISON = 277  # a token that the broken student cannot read
TRAINING = {
    "epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "projector_learning_rate": 5e-3, "warmup": 0.2, "weight_decay": 0.05,
    "clip_norm": 0.7, "precision": "fp32", "teacher": "live",
}  # fmt: skip
HARDWARE = {"gpus": 0, "threads": 1, "micro_batch_size": 3, "checkpoint_seconds": 1000.0}
METHODS = {
    "sft": {},
    "vanilla_kd": {},
    "dskd": {},
    "uld": {"alignment": "index"},
    "uld-byte": {"alignment": "byte"},
    "dskd_eta": {},
    "mcw_kd": {"update_every": 2},
}
ONE_TOKENIZER = ("sft", "vanilla_kd", "dskd")


def make_models(folder: Path) -> None:
    """Students without and with dropout, with a head of their own, with an embedding of one token that is not a number; two teachers, with
    the student's tokenizer and with another."""
    shared = models.train_tokenizer(TEXTS, TrainedTokenizer(train_on="x", vocabulary_size=VOCABULARY))
    other = models.train_tokenizer(TEXTS, TrainedTokenizer(train_on="x", vocabulary_size=TEACHER_VOCABULARY))
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    qwen2 = {
        "model_type": "qwen2",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    qwen2 |= {"num_key_value_heads": 1, "tie_word_embeddings": False, "initializer_range": 0.2}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    made = {
        "student": (gpt2 | still, shared, 0),
        "dropout": (gpt2, shared, 0),
        "untied": (qwen2, shared, 3),
        "broken": (qwen2, shared, 3),
        "teacher": (gpt2 | still | {"n_embd": 24}, shared, 1),
        "other": (qwen2, other, 2),
    }
    for name, (architecture, tokenizer, seed) in made.items():
        settings = InitModel(source="init", architecture=architecture, tokenizer="-", seed=seed)
        model = models.create(settings, tokenizer)
        if name == "broken":
            model.get_input_embeddings().weight.data[POISON] = torch.nan
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tokens(rows: int, seed: int, same: bool = True) -> Tokens:
    """Random records of very different lengths; the second tokenizer needs other numbers of tokens for the same response."""
    generator = np.random.default_rng(seed)
    sizes = np.stack([generator.integers(2, 9, rows), generator.integers(1, 24, rows)], axis=1)
    sides = {}
    for name, vocabulary in (("student", VOCABULARY), ("teacher", TEACHER_VOCABULARY)):
        if name == "teacher" and same:
            sides[name] = sides["student"]
            continue
        lengths = sizes + (np.array([0, 2]) if name == "teacher" else 0)
        sides[name] = TokenSide(
            ids=generator.integers(2, vocabulary, lengths.sum()).astype(np.int32),
            starts=np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int64),
            prompt_lengths=lengths[:, 0].astype(np.int32),
            ends=np.zeros(lengths[:, 1].sum(), np.int32),
        )
    return Tokens(sides["student"], sides["teacher"], same, {}, 0, 0)


def make_alignment(tokens: Tokens) -> Alignment:
    """Every second response token of the student with the teacher's token behind it; records of one token have no pair."""
    pairs = [np.arange(1, count, 2) for count in tokens.student.response_counts]
    student = np.concatenate(pairs).astype(np.int32)
    return Alignment(student, student + 1, np.concatenate([[0], np.cumsum([len(pair) for pair in pairs])]))


def make_spelling(tokens: Tokens, alignment: Alignment) -> Spelling:
    """Random distances of tokens of up to four bytes."""
    generator = np.random.default_rng(6)
    lengths = [generator.integers(1, 5, len(side.ends)).astype(np.uint8) for side in (tokens.student, tokens.teacher)]
    counts = [side.response_counts for side in (tokens.student, tokens.teacher)]
    starts = np.concatenate([[0], np.cumsum(counts[0] * counts[1])])
    return Spelling(generator.integers(0, 4, starts[-1]).astype(np.uint8), starts, *lengths, alignment)


def make_job(
    output, folder, method="sft", student="student", training=None, hardware=None, seed=7, rows=ROWS, **more
) -> Job:
    """A job on the models of `make_models`; changed settings are given as dictionaries.

    Sorting has ties: where two probabilities are equal the gradients of ULD and MCW jump, and round-off decides. With seed 7 it has not to.
    """
    training, hardware = TRAINING | (training or {}), HARDWARE | (hardware or {})
    same = method in ONE_TOKENIZER
    tokens = make_tokens(rows, 3, same)
    name = "teacher" if same else "other"

    def teacher(device):
        return Live(models.load(Path(folder) / name).to(device), VOCABULARY if same else TEACHER_VOCABULARY)

    if method != "sft":
        width = 24
        vocabulary = VOCABULARY if same else TEACHER_VOCABULARY
        more = {"teacher": teacher, "teacher_shape": Shape(width, width, vocabulary)} | more
    if not same:
        more["alignment"] = make_alignment(tokens)
        more["spelling"] = make_spelling(tokens, more["alignment"])
        more["vocabulary"] = relations.vocabulary(VOCABULARY, TEACHER_VOCABULARY)
    return Job(
        output=Path(output),
        identity={"method": method, "training": training},
        seed=seed,
        training=Training.model_validate(training),
        hardware=Hardware.model_validate(hardware),
        student=Path(folder) / student,
        train=tokens,
        dev=make_tokens(DEV_ROWS, 4, same),
        method=method.split("-")[0],
        method_settings=METHODS[method],
        **more,
    )


def poisoned(job: Job) -> Job:
    """The same job, but record 3 of the training data, and no other, has the token that the broken student cannot read."""
    ids = np.where(job.train.student.ids == POISON, 5, job.train.student.ids)
    ids[job.train.student.starts[3]] = POISON
    train_side = replace(job.train.student, ids=ids)
    dev_side = replace(job.dev.student, ids=job.dev.student.ids.clip(max=POISON - 1))
    return replace(job, train=replace(job.train, student=train_side), dev=replace(job.dev, student=dev_side))


def metrics(output, key="gradient_norm") -> list[float]:
    """A column of metrics.jsonl, of the lines that have it."""
    lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def weights(folder) -> dict[str, torch.Tensor]:
    """What a model folder holds."""
    from safetensors.torch import load_file

    (path,) = Path(folder).glob("*.safetensors")
    return load_file(path)


def launch_processes(processes: int = 2, expected: int = 0, **options) -> str:
    """Run a job in new processes by torchrun, or in one without it; what it printed to stderr."""
    command = [sys.executable, "-m"]
    if processes:
        command += ["torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend=c10d"]
        command += ["--rdzv_endpoint=localhost:0", "-m"]
    options = {name: str(value) if name in ("output", "folder") else value for name, value in options.items()}
    done = subprocess.run(
        [*command, "tests.training.jobs", json.dumps(options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expected, done.stderr[-3000:]
    return done.stderr


def _kill_after(count: int) -> None:
    """End this process by SIGKILL when it is about to put its `count`-th file on the disk for good."""
    left, original = count, os.fsync

    def fsync(descriptor):
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor)

    os.fsync = fsync


def _stop_in(rank: int, step: int) -> None:
    """Send SIGTERM to the process of this rank in its `step`-th optimizer step."""
    if int(os.environ["RANK"]) != rank:
        return
    left = step
    for engine in (engines.Plain, engines.DeepSpeed):

        def wrapped(self, rate, original=engine.step):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, rate)

        engine.step = wrapped


if __name__ == "__main__":  # jobs.py OPTIONS: a JSON object with the arguments of make_job
    options = json.loads(sys.argv[1])
    if "kill_after" in options:
        _kill_after(options.pop("kill_after"))
    if "stop_in" in options:
        _stop_in(*options.pop("stop_in"))
    engines.DeepSpeed.persistent = options.pop("persistent", engines.DeepSpeed.persistent)
    poison = options.pop("poison", False)
    train(poisoned(make_job(**options)) if poison else make_job(**options))
