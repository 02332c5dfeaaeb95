"""When to stop before the end: on a signal, or shortly before a cluster's time limit."""

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime

EXIT_CODE = 75  # "temporary failure; try again": not an error, not finished either
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_RESERVE = 15.0  # seconds kept back before a time limit


class Stop:
    """Remembers a signal instead of dying of it. A context manager: the old handlers come back at its end.

    On clusters that track jobs by cgroup no signal reaches a training before SIGKILL, so the end of the job is asked of SLURM.
    """

    def __init__(self):
        self.reason = ""
        self._limit = _slurm_end()
        self._old = {}

    def __enter__(self) -> "Stop":
        self._old = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame) -> None:
        self.reason = signal.Signals(number).name

    def due(self, needed: float) -> bool:
        """Whether to stop now.

        Args:
            needed: seconds that one more step and a checkpoint take.
        """
        if not self.reason and self._limit is not None and time.time() + needed + _RESERVE > self._limit:
            self.reason = "the job's time limit"
        return bool(self.reason)


def _slurm_end() -> float | None:
    """When the SLURM job that this is ends, in seconds since 1970; None outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return None
    answer = subprocess.run(["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True).stdout.strip()
    try:
        return datetime.fromisoformat(answer).timestamp()
    except ValueError:  # "NONE", "N/A", or no answer at all
        return None
