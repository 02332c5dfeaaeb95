"""on_gpus.py N -- COMMAND: run a command on N free GPUs of this machine.

Where a batch system has chosen the devices already, the command just runs. Otherwise each device is taken by a lock on a file, all N or
none, and the kernel gives them back when the command ends, however it ends.
"""

import argparse
import fcntl
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def devices() -> list[str]:
    """Indices of this machine's GPUs, or those that CUDA_VISIBLE_DEVICES leaves of them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    return listed.stdout.split()


def acquire(count: int, names: list[str]) -> dict:
    """Lock `count` of the devices; waits until so many are free at once, since two jobs with half of theirs would wait for each other."""
    folder = Path(os.environ.get("KDBENCH_GPU_LOCKS", tempfile.gettempdir()))
    while True:
        held = {}
        for name in names:
            file = open(folder / f"kdbench-gpu-{name}.lock", "a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[name] = file
            except BlockingIOError:
                file.close()
            if len(held) == count:
                return held
        for file in held.values():
            file.close()
        time.sleep(random.uniform(0.5, 2.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="N", help="how many GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run on them")
    options = parser.parse_args()
    command = [word for index, word in enumerate(options.command) if index > 0 or word != "--"]
    if "SLURM_JOB_ID" not in os.environ:
        names = devices()
        if len(names) < options.count:
            sys.exit(f"error: {options.count} GPUs asked for, this machine has {len(names)}: lower hardware.gpus")
        held = acquire(options.count, names)  # kept until this process ends
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
    sys.exit(subprocess.run(command).returncode)


main()
