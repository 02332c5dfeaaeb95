"""What every script shares: how its errors look, and that it ends with the Snakemake that started it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from kdbench.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake is told without a traceback, with exit code 2."""
    _follow_snakemake()
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _follow_snakemake(interval: float = 1.0) -> None:
    """Stop (by SIGTERM, which a training answers with a checkpoint) when the Snakemake above this process is gone.

    A Snakemake that is killed leaves its jobs behind; the next one would start them a second time beside the first.
    """
    import psutil

    above = next((parent for parent in psutil.Process().parents() if _is_snakemake(parent)), None)
    if above is None:
        return

    def watch():
        while lives(above):
            time.sleep(interval)
        try:
            print(f"the Snakemake of this job (process {above.pid}) is gone: stopping", file=sys.stderr, flush=True)
        finally:  # also where stderr ended with Snakemake
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _is_snakemake(process) -> bool:
    import psutil

    try:
        return any(os.path.basename(word) == "snakemake" for word in process.cmdline()[:3])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def lives(process) -> bool:
    """Whether a process of psutil runs, and is no zombie."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_in_jobs(source: str) -> None:
    """Let the scripts that this process starts import the library from `source`, also in other environments and on cluster nodes.

    `python` is then the one of this process, also where its environment is not activated: `.venv/bin/snakemake` is enough.
    """
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != source]
    os.environ["PYTHONPATH"] = os.pathsep.join([source, *before])
    here = os.path.dirname(sys.executable)
    search = os.environ.get("PATH", "")
    if search.split(os.pathsep)[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, search])
