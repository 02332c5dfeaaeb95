"""What a run has done, does and has yet to do, from its files alone: while it works, on a cluster, or after it has stopped."""

import argparse
import json
import re
import shutil
import socket
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kdbench import cli, files, locks
from kdbench.errors import UserError

PLAN = Path(".snakemake/kdbench-plan.json")  # what the last Snakemake of a folder set out to do

_STEP = re.compile(r"^(\S+) step (\d+)/(\d+),")
_ATTEMPT = re.compile(r"^\S+ trains ")
_QUIET = 600.0  # seconds without a sign after which a training on another machine is taken for dead


@dataclass(frozen=True)
class Run:
    """The state of one training and of the answers to it.

    Attributes:
        name: its folder below results/.
        state: "done", "evaluating" (trained, some scores are missing), "training", "stopped" (it began, and no process works on it), or
            "waiting".
        detail: more for people.
    """

    name: str
    state: str
    detail: str = ""


def write_plan(plan: dict) -> None:
    """Leave for `status` what a Snakemake sets out to do: `kdbench.plan.Plan.runs`."""
    files.write_json(PLAN, plan)


def state_of(results: Path, name: str, plan: dict) -> Run:
    """The state of a model that is to be evaluated.

    Args:
        results: the results folder.
        name: of the model's folder in it.
        plan: see `kdbench.plan.Plan.runs`.
    """
    folder, evaluations = results / name, plan["evaluations"]
    fetched = name in plan["fetched"]
    if fetched or (folder / "model/manifest.json").exists():
        scored = sum((folder / of / "scores.json").exists() for of in evaluations)
        if scored == len(evaluations):
            return Run(name, "done")
        if fetched and not scored:
            return Run(name, "waiting", "not trained here")
        return Run(name, "evaluating", f"{scored} of {len(evaluations)} sets of answers have scores")
    log = folder / "train.log"
    if not log.exists():
        return Run(name, "waiting")
    lines = files.tail(log)
    where = _worker(folder)
    if where is None:
        return Run(name, "stopped", lines[-1].split(" ", 1)[-1] if lines else "")
    return Run(name, "training", f"{_progress(folder, lines)}{where}")


def _worker(folder: Path) -> str | None:
    """Where a training is worked on, "" for here; None if it is not. The lock itself is left alone: to try it would be to hold it."""
    holder = locks.holder(folder / ".lock")
    if holder is None:
        return None
    if holder["host"] == socket.gethostname():
        return "" if _lives(holder) else None
    quiet = time.time() - (folder / "train.log").stat().st_mtime
    return f", on {holder['host']}" if quiet < _QUIET else None


def _lives(holder: dict) -> bool:
    """Whether the process that a lock names is alive; a younger one of the same number is another."""
    import psutil

    try:
        process = psutil.Process(holder["process"])
        older = process.create_time() <= datetime.fromisoformat(holder["since"]).timestamp() + 1
        return older and cli.lives(process)
    except psutil.NoSuchProcess:
        return False


def _progress(folder: Path, lines: list[str]) -> str:
    """How far a training is, its loss, and how long it will take."""
    begun = max((place for place, line in enumerate(lines) if _ATTEMPT.match(line)), default=0)
    steps = [found for line in lines[begun:] if (found := _STEP.match(line))]
    if not steps:
        return "starts"
    metrics = _last_step(folder / "metrics.jsonl")
    total, step = int(steps[-1][3]), max(int(steps[-1][2]), metrics.get("step", 0))
    text = f"step {step:,} of {total:,} ({step / total:.0%})"
    if "loss" in metrics:
        text += f", loss {metrics['loss']:.4f}"
    (first, first_step), (last, last_step) = (
        (datetime.fromisoformat(found[1]), int(found[2])) for found in (steps[0], steps[-1])
    )
    if last_step > first_step:
        left = (total - step) * (last - first).total_seconds() / (last_step - first_step)
        text += f", {_duration(left)} left"
    return text


def _last_step(path: Path) -> dict:
    """The newest metrics of a step; a line that is being written is none."""
    for line in reversed(files.tail(path)):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in metrics:
            return metrics
    return {}


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def report(results: Path, plan: dict) -> str:
    """All states as text.

    Args:
        results: the results folder.
        plan: see `kdbench.plan.Plan.runs`.
    """
    runs = [state_of(results, name, plan) for name in plan["runs"]]
    width = max(map(len, plan["runs"]), default=0)
    lines = [f"{run.name:<{width}}  {run.state:<10}  {run.detail}".rstrip() for run in runs]
    count = Counter(run.state for run in runs)
    states = ", ".join(
        f"{count[state]} {state}" for state in ("training", "evaluating", "stopped", "waiting") if count[state]
    )
    lines.append(f"{count['done']} of {len(runs)} done" + (f", {states}" if states else ""))
    free = shutil.disk_usage(results if results.exists() else ".").free
    lines.append(f"{_size(results) / 1e9:.2f} GB in {results}, {free / 1e9:.1f} GB free")
    return "\n".join(lines)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_symlink() else path.stat().st_size
        except FileNotFoundError:  # it has just been replaced
            continue
    return total


def main() -> None:
    """Print the states, again and again if that is wanted."""
    parser = argparse.ArgumentParser(prog="python -m kdbench.status", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(), help="of the workflow; by default this one")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="print them anew every so many seconds"
    )
    options = parser.parse_args()
    while True:
        plan = options.directory / PLAN
        if not plan.exists():
            raise UserError(f"{plan} is missing: no run has begun in this folder")
        print(report(options.directory / "results", files.read_json(plan)), flush=True)
        if options.watch is None:
            return
        time.sleep(options.watch)
        print(flush=True)


if __name__ == "__main__":
    cli.run(main)
