"""How far a long stage is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

_INTERVAL = 30.0  # seconds between lines where no terminal shows a bar


def over(what: str) -> Callable[[Sequence], Iterable]:
    """A wrapper for a loop over batches, to be named by what they hold."""
    return lambda batches: _bar(batches, what) if sys.stderr.isatty() else _lines(batches, what)


def _bar(batches: Sequence, what: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(batches, desc=what, unit="batch", dynamic_ncols=True)


def _lines(batches: Sequence, what: str) -> Iterator:
    started = said = time.monotonic()
    for done, batch in enumerate(batches):
        now = time.monotonic()
        if now - said > _INTERVAL:
            said = now
            left = (now - started) / done * (len(batches) - done)
            print(f"{what}: batch {done} of {len(batches)}, about {left:.0f} s left", file=sys.stderr, flush=True)
        yield batch
    print(f"{what}: {len(batches)} batches in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
