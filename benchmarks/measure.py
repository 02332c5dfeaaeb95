"""One measurement in a process of its own: steps of the floor, or steps of the real training of one method.

A training is that of `kdbench.training.run.train`, from the job to the step; it is left after the steps that are wanted.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import PADDED, SEED
from kdbench import cli, files

if TYPE_CHECKING:
    from benchmarks.stopwatch import Stopwatch
    from kdbench.data.tokens import TokenSide
    from kdbench.training.job import Job

WARM_UP = 1  # steps that are not counted: the first makes the optimizer's state
LEAST = 3  # steps that are counted, however long they take
SPLIT = 1  # steps more, for the split


class Finished(Exception):
    """All steps are measured."""


class Clock:
    """Seconds and CPU seconds of steps, and the peak memory of the process.

    Args:
        steps: how many are counted, after the warm-up.
        patience: seconds after which three will do.
        more: steps after these, whose time does not count.
        begin_more: called when these begin.
        end_of_more: called after each of them.
    """

    def __init__(self, steps: int, patience: float, more: int = 0, begin_more=lambda: None, end_of_more=lambda: None):
        self.steps, self.patience = steps, patience
        self.begin_more, self.end_of_more = begin_more, end_of_more
        self.loading = self.peak = 0
        self._left = more
        self._times: list[tuple[float, float]] = []

    def tick(self) -> None:
        """A step is done, or, the first time, the training is about to begin.

        Raises:
            Finished: it was the last one.
        """
        if self.peak:
            self.end_of_more()
            self._left -= 1
        else:
            self._times.append((time.perf_counter(), time.process_time()))
            if len(self._times) == 1:
                self.loading = _peak()
            counted = len(self._times) - 1 - WARM_UP
            late = counted >= LEAST and self._times[-1][0] - self._times[WARM_UP][0] > self.patience
            if counted < self.steps and not late:
                return
            self.peak = _peak()
            if self._left:
                self.begin_more()
        if not self._left:
            raise Finished

    def result(self, side: "TokenSide", rows: list[int]) -> dict:
        """What is reported of a measurement; see docs/benchmarks.md.

        Args:
            side: the student's tokens.
            rows: the records of a step.
        """
        tokens = int(side.lengths[rows].sum())
        counted = self._times[WARM_UP:]
        seconds, cpu = ([after[i] - before[i] for before, after in itertools.pairwise(counted)] for i in (0, 1))
        return {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "steps": seconds,
            "cpu_seconds": statistics.median(cpu),
            "peak_gb": self.peak / 1e9,
            "loading_gb": self.loading / 1e9,
            "tokens": tokens,
            "response_tokens": int(side.response_counts[rows].sum()),
            "tokens_per_second": tokens / statistics.median(seconds),
        }


def _peak() -> int:
    """Largest resident memory of this process so far, bytes. (`getrusage` would count that of the process that started it, too.)"""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def floor(place: Path, batch_size: int, clock: Clock, threads: int) -> dict:
    """Measure the floor on the student and the records of a prepared folder."""
    import torch

    from benchmarks import floor
    from kdbench import models
    from kdbench.data.tokens import Tokens

    torch.set_num_threads(threads)
    side = Tokens.load(place / "tokens").student
    rows = _first_step(side.rows, batch_size)
    batch = floor.padded([side.row(row) for row in rows], side.prompt_lengths[rows], PADDED)
    model = models.load(place.parent / "student", train=True)
    with contextlib.suppress(Finished):
        floor.run(model, batch, clock.tick)
    return clock.result(side, rows)


def _first_step(records: int, batch_size: int) -> list[int]:
    """The records of the first step of a training, as of every other: the data set repeats them."""
    from kdbench.data import batches

    return batches.schedule(records, batch_size, 0, SEED)[0]


def training(job: "Job", clock: Clock, stopwatch: "Stopwatch | None") -> dict:
    """Measure steps of the real training.

    Args:
        job: to train; left after the steps that the clock wants.
        clock: of the steps.
        stopwatch: counts the split in the steps that the clock has for it, or None.
    """
    from benchmarks.stopwatch import install
    from kdbench.training.progress import Progress
    from kdbench.training.run import train

    def begin(self, *args, original=Progress.begin) -> None:
        original(self, *args)
        clock.tick()

    def step(self, *args, original=Progress.step) -> None:
        original(self, *args)
        clock.tick()

    Progress.begin, Progress.step = begin, step
    if stopwatch is not None:
        job = replace(job, teacher=install(stopwatch, job.teacher))
    with contextlib.suppress(Finished):
        train(job)
    return clock.result(job.train.student, _first_step(job.train.rows, job.training.batch_size))


def job(output: Path, place: Path, method: str, source: str, batch_size: int, hardware: dict) -> "Job":
    """The training of a method with its default settings on a prepared folder.

    Args:
        output: folder of the run, the same for all of its processes.
        place: that `benchmarks.rows.prepare` made.
        method: name in the registry.
        source: "live" or "cached", of the teacher.
        batch_size: records of a step, over all processes.
        hardware: settings of `kdbench.settings.Hardware` that differ from the benchmark's own: no GPU, one thread, a step in one forward
            pass.
    """
    from kdbench import methods, teacher
    from kdbench.alignment import vocabulary
    from kdbench.alignment.pairs import Alignment
    from kdbench.alignment.spelling import Spelling
    from kdbench.data.tokens import Tokens
    from kdbench.settings import Hardware, Training
    from kdbench.training.job import Job

    tokens = Tokens.load(place / "tokens")
    settings = methods.get(method).Settings()
    needs = methods.get(method).needs(settings)
    hardware = Hardware(
        **{"gpus": 0, "threads": 1, "micro_batch_size": batch_size, "checkpoint_seconds": 1e6} | hardware
    )
    training = Training(epochs=1, batch_size=batch_size, precision="fp32", select="last", teacher=source)
    more = {}
    if needs.teacher == "signal":
        fingerprint = files.read_manifest(place / "tokens", "tokens")["fingerprint"]
        if source == "cached":
            made = teacher.from_cache(place / "cache", place.parent / "teacher", fingerprint)
        else:
            made = teacher.from_model(place.parent / "teacher", hardware)
        more = dict(zip(("teacher", "teacher_shape"), made, strict=True))
    if needs.alignment == "byte" or needs.chunks:
        more["alignment"] = Alignment.load(place / "alignment")
    if needs.alignment == "dtw" or needs.spelling:
        more["spelling"] = Spelling.load(place / "spelling")
    if needs.vocabulary:
        more["vocabulary"] = vocabulary.load(place.parents[1] / "vocabulary")
    identity = {"method": method, "teacher": source}
    return Job(
        output,
        identity,
        SEED,
        training,
        hardware,
        place.parent / "student",
        tokens,
        tokens,
        method,
        settings.model_dump(),
        **more,
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure as the arguments say, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that benchmarks.rows made for a pair and batch size")
    parser.add_argument("method", help="`floor`, or the name of a method")
    parser.add_argument("--teacher", choices=["live", "cached"], default="live")
    parser.add_argument("--batch-size", type=int, default=4, help="records of a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are counted at most")
    parser.add_argument("--patience", type=float, default=10.0, help=f"seconds after which {LEAST} steps will do")
    parser.add_argument("--split", action="store_true", help="tell where the time goes")
    parser.add_argument(
        "--hardware", type=json.loads, default={}, metavar="JSON", help="`hardware` of the configuration"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the result goes, as JSON")
    options = parser.parse_args(arguments)
    laps, stopwatch = [], None
    if options.split:
        from benchmarks.stopwatch import Stopwatch

        stopwatch = Stopwatch()
        more = (SPLIT, stopwatch.start, lambda: laps.append(stopwatch.lap()))
        clock = Clock(options.steps, options.patience, *more)
    else:
        clock = Clock(options.steps, options.patience)
    if options.method == "floor":
        found = floor(options.folder, options.batch_size, clock, options.hardware.get("threads", 1))
    else:
        output = options.output.with_suffix(".run")
        output.mkdir(exist_ok=True)
        of = options.method, options.teacher, options.batch_size, options.hardware
        found = training(job(output, options.folder, *of), clock, stopwatch)
    if laps:
        found["split"] = {part: statistics.mean(lap[part] for lap in laps) for part in laps[0]}
    if int(os.environ.get("RANK", 0)) == 0:
        files.write_json(options.output, found)


if __name__ == "__main__":
    cli.run(main)
