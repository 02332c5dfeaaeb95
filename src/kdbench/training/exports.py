"""Finished models of a run: the best epochs while it goes on, one of them at the end."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from kdbench import files, models
from kdbench.training.engines import Engine
from kdbench.training.job import Job
from kdbench.training.processes import Processes


def best(epochs: list[dict], count: int) -> list[int]:
    """The `count` epochs of the lowest dev loss, best first; of equals the earlier one."""
    return [of["epoch"] for of in sorted(epochs, key=lambda of: (of["dev_loss"], of["epoch"]))[:count]]


class Exports:
    """Writes models in Hugging Face or peft format. All processes take part, number 0 writes.

    Args:
        job: the training.
        fingerprint: of its identity and seed, for the manifests.
        processes: of the training.
    """

    def __init__(self, job: Job, fingerprint: str, processes: Processes):
        self.job, self.fingerprint, self.processes = job, fingerprint, processes
        self.folder = Path(job.output)
        self._by_dev_loss = job.training.select == "dev_loss"
        self._wanted = max(job.training.keep_best, int(self._by_dev_loss))

    def add(self, epochs: list[dict], engine: Engine) -> None:
        """Export the model as it is after the last of `epochs`, if that is one of the best so far."""
        epoch = epochs[-1]["epoch"]
        if epoch in best(epochs, self._wanted):
            self._write(self._of(epoch), epochs[-1], engine)

    def keep(self, histories: Iterable[list[dict]]) -> None:
        """Remove exports that no history has among its best: neither the present, nor one that a training may fall back to."""
        if self.processes.rank:
            return
        kept = {self._of(epoch) for epochs in histories for epoch in best(epochs, self._wanted)}
        for path in (self.folder / "best").glob("epoch-*"):
            if path not in kept:
                shutil.rmtree(path)

    def finish(self, epochs: list[dict], engine: Engine) -> dict:
        """Make the run's `model/` and leave no more than the `keep_best` best epochs beside it; the epoch that was chosen."""
        chosen = best(epochs, 1)[0] if self._by_dev_loss else epochs[-1]["epoch"]
        facts = next(of for of in epochs if of["epoch"] == chosen)
        if self._by_dev_loss:
            if self.processes.rank == 0:
                part = files.fresh_folder(self.folder / "model")
                shutil.copytree(self._of(chosen), part, dirs_exist_ok=True)
                files.finish_folder(self.folder / "model")
        else:
            self._write(self.folder / "model", facts, engine)
        if self.processes.rank == 0:
            self._wanted = self.job.training.keep_best
            self.keep([epochs])
            if not self._wanted:
                shutil.rmtree(self.folder / "best", ignore_errors=True)
        self.processes.wait()
        return facts

    def _of(self, epoch: int) -> Path:
        return self.folder / "best" / f"epoch-{epoch}"

    def _write(self, folder: Path, facts: dict, engine: Engine) -> None:
        weights = engine.weights()
        if self.processes.rank == 0:
            part = files.fresh_folder(folder)
            student = engine.module.student
            models.save(student, part, self.job.student, weights, self.job.trust_remote_code)
            files.write_manifest(
                part, "model", run=self.fingerprint, method=self.job.method, tuning=self.job.training.tuning, **facts
            )
            files.finish_folder(folder)
        self.processes.wait()
