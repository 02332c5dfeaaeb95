"""From a job to a finished model."""

import importlib.metadata
import platform
import sys
from datetime import datetime
from pathlib import Path

import torch

from kdbench import files, methods, models
from kdbench.errors import UserError
from kdbench.locks import Lock
from kdbench.training import engines
from kdbench.training.checkpoints import KEPT, Checkpoints
from kdbench.training.distiller import Distiller
from kdbench.training.exports import Exports
from kdbench.training.job import Job
from kdbench.training.loop import Loop
from kdbench.training.processes import Processes, start
from kdbench.training.progress import Progress

_PATIENCE = 10.0  # seconds that a training whose Snakemake was killed may take for its last step and checkpoint
_PACKAGES = ("kdbench", "torch", "transformers", "peft", "deepspeed", "tokenizers", "safetensors", "numpy")


def train(job: Job) -> None:
    """Train a student; go on from the last checkpoint if an earlier attempt left one.

    The run's folder gets config.json (identity and seed), args.json (how and where, of this attempt), train.log, metrics.jsonl, and at the
    end `model/`; `checkpoints/` while it trains; `best/` with the epochs of `keep_best`.

    Raises:
        UserError: another process trains this run; the job cannot work; a loss or gradient is not finite.
        SystemExit: 75, stopped on purpose; the next attempt goes on from here.
    """
    processes = start(job.hardware)
    models.quiet()
    try:
        lock = _lock(job, processes)
        progress = Progress(job.output, processes.rank, processes.device)
        try:
            _train(job, processes, progress)
        except UserError as error:
            progress.log(f"error: {error}")  # the script tells the terminal
            raise
        finally:
            progress.close()
            if lock is not None:
                lock.release()
    finally:
        processes.end()


def _lock(job: Job, processes: Processes) -> Lock | None:
    """Process 0 holds the run's lock; that it could not get it, all of them learn."""
    lock = problem = None
    if processes.rank == 0:
        try:
            lock = Lock(Path(job.output) / ".lock", f"the training of {job.output}", _PATIENCE)
        except UserError as error:
            problem = str(error)
    problem = processes.share(problem)
    if problem is not None:
        raise UserError(problem)
    return lock


def _train(job: Job, processes: Processes, progress: Progress) -> None:
    output, hardware = Path(job.output), job.hardware
    decides = {"identity": job.identity, "seed": job.seed}
    run = files.fingerprint(decides)
    sharding = hardware.zero_stage if hardware.engine == "deepspeed" else None
    checkpoint = files.fingerprint(decides | {"world": processes.world, "engine": [hardware.engine, sharding]})
    method = methods.get(job.method)
    settings = method.Settings.model_validate(job.method_settings)
    if processes.rank == 0:
        (output / "model" / files.MANIFEST).unlink(missing_ok=True)  # an older model is not this run's result
        files.write_json(output / "config.json", job.identity | {"seed": job.seed})
        files.write_json(output / "args.json", _resolved(job, settings, processes))

    needs = method.needs(settings)
    _check(job, needs)
    distiller = _distiller(job, method, settings).to(processes.device).train()
    trained = sum(parameter.numel() for parameter in distiller.parameters() if parameter.requires_grad)
    _check_space(output / "checkpoints", trained)
    teacher = job.teacher(processes.device) if needs.teacher == "signal" else None
    if teacher is not None:
        distiller.initialize(teacher.head(processes.device))
    if hardware.compile:
        models.compile_body(distiller.student)
    engine = engines.build(distiller, job.training, hardware, processes)
    progress.say(
        f"trains {job.student} by {job.method} (run {run}, seed {job.seed}): {trained:,} parameters, "
        f"{job.train.rows:,} records, {processes.world} process(es) on {processes.device.type}, "
        f"{hardware.engine}, {job.training.precision}"
    )
    if not distiller.packed:
        progress.say("the student's architecture cannot read packed batches: they are padded, which takes longer")
    checkpoints = Checkpoints(output / "checkpoints", checkpoint, processes, progress.say)
    exports = Exports(job, run, processes)
    loop = Loop(job, needs, processes, engine, teacher, checkpoints, exports, progress)
    loop.run()
    chosen = exports.finish(loop.position.epochs, engine)
    if processes.rank == 0:
        checkpoints.remove()
    progress.say(f"finished: {output / 'model'} is epoch {chosen['epoch']}, dev loss {chosen['dev_loss']:.4f}")


def _check_space(folder: Path, trained: int) -> None:
    """Raises UserError where the disk has no room for the checkpoints: weights and both moments of AdamW in float32, of each one kept and
    of the one being written."""
    needed = (KEPT + 1) * 3 * 4 * trained - files.allocated(folder)
    files.check_space(folder, needed, "the folder of checkpoints", "train adapters (`training.tuning: lora`)")


def _check(job: Job, needs) -> None:
    """Mistakes that would show only after the models are loaded, or never."""
    for name, tokens in (("training", job.train), ("dev", job.dev)):
        if tokens.rows == 0:
            raise UserError(f"the {name} data set has no records")
    if needs.teacher == "signal" and (job.teacher is None or job.teacher_shape is None):
        raise UserError(f"method {job.method} needs a teacher's signal, and the job has no teacher")
    for what, needed, given in (
        ("an alignment", needs.alignment == "byte" or needs.chunks, job.alignment),
        ("the spelling of its tokens", needs.alignment == "dtw" or needs.spelling, job.spelling),
        ("the relation of the two vocabularies", needs.vocabulary, job.vocabulary),
    ):
        if needed and given is None:
            raise UserError(f"method {job.method} needs {what}, and the job has none")
    if not Path(job.student).is_dir():
        raise UserError(f"the student {job.student} is no folder")
    if (Path(job.student) / "adapter_config.json").exists():
        raise UserError(f"{job.student} is an adapter: merge it into its base model to use it as a student")


def _distiller(job: Job, method, settings) -> Distiller:
    """Student and method; what is initialised comes from the seed, the same on every device and in every process."""
    tokenizer = models.load_tokenizer(job.student, job.trust_remote_code)
    student = models.load(job.student, trust_remote_code=job.trust_remote_code, train=True)
    models.check_head(student, tokenizer)
    models.check_positions(student, max(int(tokens.student.lengths.max()) for tokens in (job.train, job.dev)))
    if job.hardware.gradient_checkpointing:
        student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    shape = models.shape(student, tokenizer)
    torch.manual_seed(job.seed)
    if job.training.tuning == "lora":
        student = models.add_adapters(student, job.training.lora)
    return Distiller(student, method(settings, shape, job.teacher_shape, job.vocabulary), len(tokenizer), job.training)


def _resolved(job: Job, settings, processes: Processes) -> dict:
    """How and where this attempt runs: for people who ask later."""
    return {
        "output": str(job.output),
        "student": str(job.student),
        "method": job.method,
        "method_settings": settings.model_dump(),
        "seed": job.seed,
        "training": job.training.model_dump(),
        "hardware": job.hardware.model_dump(),
        "records": {"train": job.train.rows, "dev": job.dev.rows},
        "world": processes.world,
        "device": str(processes.device),
        "host": platform.node(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }
