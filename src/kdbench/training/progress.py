"""What a training says of itself: metrics.jsonl for programs, train.log and the terminal for people."""

import json
import resource
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

from kdbench import files

_INTERVAL = 30.0  # seconds between lines where no terminal shows a bar


class Progress:
    """Writes for one process; all but number 0 are silent. Both files outlive interruptions: an attempt adds to what is there.

    Args:
        folder: the run's folder.
        rank: of the process.
        device: whose memory is reported.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device):
        self.folder, self.device, self._silent = Path(folder), device, rank > 0
        self._metrics = self._log = self._bar = None
        self._said = 0.0
        if not self._silent:
            self._log = open(self.folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115  (closed in `close`)

    def say(self, message: str) -> None:
        """One line for people, in train.log and on the terminal."""
        line = self.log(message)
        if self._silent:
            return
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def log(self, message: str) -> str:
        """One line for people, in train.log alone; what it looks like there."""
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {message}"
        if not self._silent:
            self._log.write(line + "\n")
            self._log.flush()
        return line

    def begin(self, step: int, total: int) -> None:
        """Start after so many steps: metrics of later ones, from an attempt that got further, are taken back."""
        if self._silent:
            return
        path = self.folder / "metrics.jsonl"
        files.write_text(path, "".join(_up_to(path, step)))
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def record(self, metrics: dict) -> None:
        """One line of metrics.jsonl."""
        if not self._silent:
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()

    def step(self, metrics: dict, total: int) -> None:
        """A line of metrics of a step, and now and then one for people."""
        self.record(metrics)
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s", refresh=False
            )
        elif time.monotonic() - self._said > _INTERVAL:
            self._said = time.monotonic()
            self.say(
                f"step {metrics['step']}/{total}, epoch {metrics['epoch']}: loss {metrics['loss']:.4f}, "
                f"gradient norm {metrics['gradient_norm']:.3g}, {metrics['tokens_per_second']:.0f} tokens/s"
            )

    def memory(self) -> float:
        """Peak memory of this process in MB: of its GPU, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def close(self) -> None:
        """Close the files."""
        for open_one in (self._bar, self._metrics, self._log):
            if open_one is not None:
                open_one.close()


def _up_to(path: Path, step: int) -> list[str]:
    """The lines of a metrics file that belong to the first so many steps; a line cut short by a crash belongs to none."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    return kept
