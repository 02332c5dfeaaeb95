"""Locks that the kernel drops when their holder ends, however it ends, and that say who holds them."""

import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from kdbench.errors import UserError


class Lock:
    """An exclusive lock on a file, held until `release` or the end of the process. Programs that it starts do not inherit it."""

    def __init__(self, path, what: str, patience: float = 0.0):
        """Take the lock.

        Args:
            path: the lock file; it stays, empty of meaning once nobody holds it.
            what: what is locked, for the message to whoever comes second.
            patience: seconds to wait for the holder before giving up.

        Raises:
            UserError: somebody else holds it; says who (host, process) and since when. Or the file system has no locks.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+")  # noqa: SIM115  (closing it is releasing it)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self._file.close()
                    raise UserError(
                        f"{what} is in use by {self._holder()}: wait for it, or end it (lock file {self.path})"
                    ) from None
                time.sleep(0.2)
            except OSError as error:  # some network file systems are mounted without locks
                self._file.close()
                raise UserError(
                    f"{self.path} cannot be locked ({error.strerror}): work on another file system"
                ) from None
        self._file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": now}, self._file)
        self._file.flush()

    def _holder(self) -> str:
        found = holder(self.path)
        if found is None:  # it has the lock, but has not yet written down who it is
            return "another process"
        return f"process {found['process']} on {found['host']} since {found['since']}"

    def release(self) -> None:
        """Let others have it."""
        self._file.close()


def holder(path) -> dict | None:
    """Who wrote itself into a lock file last, `host`, `process` and `since`, whether it still holds the lock or not; None if nobody has."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def hold_workflow(folder: Path) -> Lock:
    """Lock a workflow folder for one Snakemake, and clear what a killed one left locked.

    Snakemake's own lock files outlive a killed process and do not say whose they are. Whoever gets this lock knows that no other run of
    this workflow is alive, so those files mean nothing.

    Args:
        folder: the `.snakemake` folder.

    Raises:
        UserError: another Snakemake works in this folder.
    """
    lock = Lock(folder / "kdbench.lock", "this folder")
    for stale in (folder / "locks").glob("*.lock"):
        stale.unlink(missing_ok=True)
    return lock
