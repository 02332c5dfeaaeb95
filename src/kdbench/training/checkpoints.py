"""Checkpoints of a running training: whole or absent, of this very run, and found undamaged before they are read."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError
from kdbench.training.engines import Engine
from kdbench.training.processes import Processes

KEPT = 2
_STATE = "state.json"


class Checkpoints:
    """The folders `step-<n>` of one run. They are no result: the last two are kept, and none once the training is done.

    A checkpoint holds what the engine saves, and `state.json`: the run's fingerprint, the position, the size of every file.

    Args:
        folder: where they lie.
        fingerprint: of everything that a run and its checkpoints must agree in.
        processes: all of them take part; number 0 writes.
        say: tells the user.
    """

    def __init__(self, folder: Path, fingerprint: str, processes: Processes, say: Callable[[str], None]):
        self.folder, self.fingerprint, self.processes, self.say = Path(folder), fingerprint, processes, say

    def write(self, position: dict, engine: Engine) -> None:
        """Save the state after `position["step"]` steps; then forget all but the last two."""
        part, final = self.folder / "writing", self.folder / f"step-{position['step']}"
        first = self.processes.rank == 0
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.processes.wait()
        engine.save(part)
        self.processes.wait()
        if first:
            written = {path: path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
            for path in written:
                _sync(path)
            sizes = {str(path.relative_to(part)): size for path, size in written.items()}
            files.write_json(part / _STATE, {"fingerprint": self.fingerprint, "position": position, "files": sizes})
            _sync(part)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            _sync(self.folder)
            for old in self._folders()[KEPT:]:
                shutil.rmtree(old)
        self.processes.wait()

    def resume(self, engine: Engine) -> dict | None:
        """Load the newest good checkpoint of this run; its position, or None where there is none.

        What belongs to another run or is damaged is reported and removed.
        """
        name, position = self.processes.share(self._newest() if self.processes.rank == 0 else None)
        if name is not None:
            engine.load(self.folder / name)
            self.processes.wait()
        return position

    def positions(self) -> list[dict]:
        """Positions of the checkpoints that are kept."""
        return [files.read_json(folder / _STATE)["position"] for folder in self._folders()]

    def last(self) -> str:
        """The newest checkpoint in words, for a message."""
        folders = self._folders()
        return f"last good checkpoint: {folders[0]}" if folders else "there is no checkpoint yet"

    def remove(self) -> None:
        """Forget all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))

    def _newest(self) -> tuple[str | None, dict | None]:
        for folder in self._folders():
            problem = self._problem(folder)
            if problem is None:
                return folder.name, files.read_json(folder / _STATE)["position"]
            self.say(f"{folder} is not used: {problem}; it is removed")
            shutil.rmtree(folder)
        return None, None

    def _problem(self, folder: Path) -> str | None:
        try:
            state = files.read_json(folder / _STATE)
        except UserError as error:
            return f"it is damaged ({error})"
        if state["fingerprint"] != self.fingerprint:
            return (
                f"it belongs to another configuration, number of processes or engine ({state['fingerprint']}, "
                f"this is {self.fingerprint})"
            )
        for name, size in state["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                return f"it is damaged ({name} is missing or has another size)"
            if path.suffix == ".pt" and not _intact(path):
                return f"it is damaged (a checksum in {name} is wrong)"
        return None


def _intact(path: Path) -> bool:
    """torch.save writes a zip archive with a checksum of every member, and torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
