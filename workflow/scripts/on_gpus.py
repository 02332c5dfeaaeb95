"""on_gpus.py N -- COMMAND: run a command on N free GPUs of this machine.

Where a batch system has chosen the devices already, the command just runs. Otherwise each device is taken by a lock, all N or none, and
the kernel gives them back when the command ends, however it ends.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kdbench import cli
from kdbench.errors import UserError
from kdbench.locks import Lock


def devices() -> list[str]:
    """Indices of this machine's GPUs, or those that CUDA_VISIBLE_DEVICES leaves of them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()


def acquire(count: int, names: list[str]) -> dict[str, Lock]:
    """Lock `count` of the devices; waits until so many are free at once, since two jobs with half of theirs would wait for each other."""
    folder = Path(os.environ.get("KDBENCH_GPU_LOCKS", tempfile.gettempdir()))
    while True:
        held: dict[str, Lock] = {}
        for name in names:
            try:
                held[name] = Lock(folder / f"kdbench-gpu-{name}.lock", f"GPU {name}")
            except UserError:
                continue  # another job has this one
            if len(held) == count:
                return held
        for lock in held.values():
            lock.release()
        time.sleep(random.uniform(0.5, 2.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="N", help="how many GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run on them")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    held = {}
    if "SLURM_JOB_ID" not in os.environ:
        names = devices()
        if len(names) < options.count:
            raise UserError(f"{options.count} GPUs asked for, this machine has {len(names)}: lower hardware.gpus")
        held = acquire(options.count, names)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
    code = subprocess.run(command).returncode
    for lock in held.values():
        lock.release()
    sys.exit(code)


cli.run(main)
