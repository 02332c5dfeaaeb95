"""How far a long stage is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

_INTERVAL = 30.0  # seconds between lines where no terminal shows a bar


def over(what: str, one: str = "batch", several: str = "batches") -> Callable[[Sequence], Iterable]:
    """A wrapper for a loop, to be named by what it makes, and by what it goes over."""
    return lambda steps: _bar(steps, what, one) if sys.stderr.isatty() else _lines(steps, what, one, several)


def _bar(steps: Sequence, what: str, one: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(steps, desc=what, unit=one, dynamic_ncols=True)


def _lines(steps: Sequence, what: str, one: str, several: str) -> Iterator:
    started = said = time.monotonic()
    for done, step in enumerate(steps):
        now = time.monotonic()
        if now - said > _INTERVAL:
            said = now
            left = (now - started) / done * (len(steps) - done)
            print(f"{what}: {one} {done} of {len(steps)}, about {left:.0f} s left", file=sys.stderr, flush=True)
        yield step
    print(f"{what}: {len(steps)} {several} in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
