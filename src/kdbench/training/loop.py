"""The training loop: one for fine-tuning and for every method, on every engine."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from kdbench.data import batches
from kdbench.errors import UserError
from kdbench.methods.base import Needs
from kdbench.signals import Step
from kdbench.teacher import TeacherSource
from kdbench.training.checkpoints import Checkpoints
from kdbench.training.engines import Engine
from kdbench.training.exports import Exports
from kdbench.training.job import Job
from kdbench.training.processes import Processes
from kdbench.training.progress import Progress
from kdbench.training.schedule import rate
from kdbench.training.stopping import EXIT_CODE, Stop


@dataclass
class Position:
    """How far a training is: what a checkpoint has to remember besides the engine's state.

    Attributes:
        step: optimizer steps that are done.
        epochs: `epoch` (counted from 1) and `dev_loss` of those that are done.
        method: what the method has adapted without gradient.
    """

    step: int = 0
    epochs: list[dict] = field(default_factory=list)
    method: dict = field(default_factory=dict)


class Loop:
    """Steps, epochs and checkpoints of one training.

    Everything that is random in a step (dropout) is drawn from (seed, step, process), so that no generator's state has to be kept: a
    training that resumes is the training that was never interrupted.
    """

    def __init__(
        self,
        job: Job,
        needs: Needs,
        processes: Processes,
        engine: Engine,
        teacher: TeacherSource | None,
        checkpoints: Checkpoints,
        exports: Exports,
        progress: Progress,
    ):
        self.job, self.needs, self.processes, self.engine, self.teacher = job, needs, processes, engine, teacher
        self.checkpoints, self.exports, self.progress = checkpoints, exports, progress
        self.position = Position()
        self.lengths = job.train.student.lengths
        self.responses = job.train.student.response_counts
        self._work = batches.work(self.lengths, self.responses)
        self.steps_per_epoch = math.ceil(len(self.lengths) / job.training.batch_size)
        self.total = self.steps_per_epoch * job.training.epochs
        self._saved = time.monotonic()
        self._needed = 0.0  # seconds of the longest step and the longest checkpoint so far

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end.

        Raises:
            SystemExit: with code 75, stopped by a signal or before a time limit, after writing a checkpoint.
            UserError: a loss or a gradient is not finite.
        """
        found = self.checkpoints.resume(self.engine)
        self.position = Position(**found) if found else Position()
        if found:
            self.engine.module.method.restore(self.position.method)
            self.progress.say(f"goes on after step {self.position.step} of {self.total}")
        self.progress.begin(self.position.step, self.total)
        self.exports.keep(of["epochs"] for of in self.checkpoints.positions())
        with Stop() as stop:
            while self.position.step < self.total:
                self._epoch(stop)

    def _epoch(self, stop: Stop) -> None:
        training = self.job.training
        epoch, done = divmod(self.position.step, self.steps_per_epoch)
        order = batches.schedule(len(self.lengths), training.batch_size, epoch, self.job.seed)
        for rows in order[done:]:
            leave, save = self._step(rows, epoch, stop)
            if self.position.step % self.steps_per_epoch == 0:
                self._end_of_epoch(epoch + 1)
            elif save or leave:
                self._checkpoint()
            if leave and self.position.step < self.total:
                self.progress.say(f"stopped ({stop.reason or 'another process'}) after step {self.position.step}")
                raise SystemExit(EXIT_CODE)

    def _step(self, rows: list[int], epoch: int, stop: Stop) -> tuple[bool, bool]:
        """One optimizer step on a global batch; whether to stop, and whether to write a checkpoint, as all processes agree."""
        began = time.monotonic()
        job, position, world = self.job, self.position, self.processes.world
        _reseed(job.seed, position.step, self.processes)
        parts = self._split(rows, self.lengths, self._work)
        tokens = int(self.responses[rows].sum())
        found = [self._accumulate(part, rows, world / tokens, last=part is parts[-1]) for part in parts]
        due = stop.due(self._needed), began - self._saved >= job.hardware.checkpoint_seconds
        flags = torch.tensor([float(flag) for flag in due], device=self.processes.device)
        *sums, leave, save = self.processes.sum(torch.cat([torch.stack(found).double().sum(0), flags]))
        names = ("loss", *self.engine.module.names)
        if not math.isfinite(sum(sums)):
            self._refuse(self._culprits(names, parts, found))
        norm = self.engine.step(rate(position.step, self.total, job.training))
        if not math.isfinite(norm):
            self._refuse({("gradient", *rows)})
        position.step += 1
        method = self.engine.module.method
        adapted = method.observe(dict(zip(names[1:], sums[1:], strict=True)), tokens, position.step)
        position.method = method.state()
        seconds = time.monotonic() - began
        self._needed = max(self._needed, seconds)
        metrics = {"step": position.step, "epoch": epoch + 1}
        metrics |= {name: value / tokens for name, value in zip(names, sums, strict=True)}
        metrics |= adapted
        metrics |= dict(zip(("learning_rate", "projector_learning_rate"), self.engine.rates(), strict=False))
        metrics |= {"gradient_norm": norm, "tokens_per_second": float(self.lengths[rows].sum() / seconds)}
        self.progress.step(metrics | {"memory_mb": self.progress.memory()}, self.total)
        return leave > 0, save > 0

    def _split(self, rows: Sequence[int], lengths: np.ndarray, work: np.ndarray) -> list[list[int]]:
        """This process' micro-batches of some records."""
        processes, hardware = self.processes, self.job.hardware
        limits = hardware.micro_batch_size, hardware.micro_batch_tokens
        return batches.split(rows, lengths, work, processes.rank, processes.world, *limits)

    def _accumulate(self, part: list[int], rows: list[int], scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; its sums, detached.

        A process without records of its own (the batch is smaller than the number of processes) runs one of them for nothing: with a
        sharded model the others wait for it.
        """
        needs = self.needs
        signalled = needs.teacher == "signal"
        job = self.job
        batch = batches.collate(
            job.train,
            part or rows[:1],
            signalled,
            needs.alignment,
            job.alignment,
            job.spelling,
            chunks=needs.chunks,
            costs=needs.spelling,
        ).to(self.processes.device)
        signal = self.teacher.signal(batch.rows, batch.teacher, self.processes.device) if signalled else None
        step = Step(self.position.step / self.total, batch.pairs, batch.chunks, batch.spelling)
        with self.engine.accumulate(last):
            total, sums = self.engine.net(batch.student, signal, step)
            self.engine.backward(total * (scale if part else 0.0))
        return sums if part else torch.zeros_like(sums)

    def _culprits(self, names: tuple[str, ...], parts: list[list[int]], found: list[torch.Tensor]) -> set[tuple]:
        """Every component that is not finite in a micro-batch of this process, with the records of that."""
        return {
            (name, *part)
            for part, sums in zip(parts, found, strict=True)
            for name, value in zip(names, sums.tolist(), strict=True)
            if not math.isfinite(value)
        }

    def _refuse(self, culprits: set[tuple]) -> None:
        """Stop all processes, and tell what is not finite where."""
        told = sorted(set().union(*self.processes.gather(culprits)))
        where = "; ".join(f"{name} of records {', '.join(map(str, records))}" for name, *records in told)
        raise UserError(
            f"step {self.position.step + 1}, method {self.job.method}: not finite: {where} (records counted from 0); "
            f"{self.checkpoints.last()}"
        )

    def _end_of_epoch(self, epoch: int) -> None:
        loss = self._dev_loss()
        if not math.isfinite(loss):
            raise UserError(f"the dev loss after epoch {epoch} is not finite; {self.checkpoints.last()}")
        self.position.epochs.append({"epoch": epoch, "dev_loss": loss})
        self.progress.record({"step": self.position.step, "epoch": epoch, "dev_loss": loss})
        self.progress.say(f"epoch {epoch} of {self.job.training.epochs} is done: dev loss {loss:.4f}")
        self.exports.add(self.position.epochs, self.engine)
        self._checkpoint()
        self.exports.keep(of["epochs"] for of in self.checkpoints.positions())

    @torch.no_grad()
    def _dev_loss(self) -> float:
        """Cross entropy per response token of the dev records, the same measure for every method."""
        column = self.job.dev.student
        work = batches.work(column.lengths, column.response_counts)
        parts = self._split(range(column.rows), column.lengths, work)
        module = self.engine.module.eval()
        found = []
        for part in parts:
            _, sums = module(batches.side(column, part or [0]).to(self.processes.device))
            found.append(sums[0] if part else torch.zeros_like(sums[0]))
        module.train()
        (total,) = self.processes.sum(torch.stack(found).double().sum(0, keepdim=True))
        return total / int(column.response_counts.sum())

    def _checkpoint(self) -> None:
        began = time.monotonic()
        self.checkpoints.write(asdict(self.position), self.engine)
        self._saved = time.monotonic()
        self._needed = max(self._needed, self._saved - began)


def _reseed(seed: int, step: int, processes: Processes) -> None:
    """Seed what dropout draws from; `torch.manual_seed` turns to every kind of device that there might be, a millisecond each time."""
    (state,) = np.random.SeedSequence([seed, step, processes.rank]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(state >> np.uint64(1)))
    if processes.device.type == "cuda":
        torch.cuda.manual_seed(int(state >> np.uint64(1)))
