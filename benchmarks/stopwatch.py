"""Where the time of a step goes, told from outside: functions of the library are wrapped, nothing in the library knows of it."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import PARTS
from kdbench import models
from kdbench.data import batches
from kdbench.losses import ot, semi_dual
from kdbench.training import engines

_TRANSPORT = (ot.sinkhorn, ot.sinkhorn_divergence, semi_dual.semi_dual, semi_dual.semi_dual_potentials)
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.mm.out, _ATEN.addmm.default, _ATEN.addmm_.default, _ATEN.bmm.default}


class Stopwatch:
    """CPU seconds of each part of a step, as the split serves to compare versions of one program on machines that others use, too. A part
    that runs within another counts for itself alone.

    Attributes:
        seconds: CPU seconds of each part since the last `lap`; what runs in no part is "other".
        running: whether it counts; it costs nothing worth mentioning while it does not.
    """

    def __init__(self):
        self.running = False
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts = ["other"]
        self._since = 0.0

    def start(self) -> None:
        """Begin to count."""
        self.running, self._since = True, time.process_time()

    def lap(self) -> dict[str, float]:
        """The seconds since the start or the last lap."""
        self._book()
        found, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return found

    @contextlib.contextmanager
    def part(self, name: str):
        """What runs in this context counts as a part."""
        if not self.running:
            yield
            return
        self._book()
        self._parts.append(name)
        try:
            yield
        finally:
            self._book()
            self._parts.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """A function whose calls count as a part."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped

    def _book(self) -> None:
        now = time.process_time()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class _HeadProducts(TorchDispatchMode):
    """Counts matrix products with the weight of the teacher's head, wherever in a loss or its gradient they are computed."""

    def __init__(self, stopwatch: Stopwatch):
        super().__init__()
        self.stopwatch = stopwatch
        self.weight = -1  # address of the head's weight

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and any(
            isinstance(of, torch.Tensor) and of.untyped_storage().data_ptr() == self.weight for of in args
        ):
            with self.stopwatch.part("teacher_head"):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Teacher:
    """A teacher's source whose signal is timed."""

    def __init__(self, source, stopwatch: Stopwatch):
        self.source = source
        self.signal = stopwatch.timed("teacher_body", source.signal)

    def head(self, device):
        return self.source.head(device)


def install(stopwatch: Stopwatch, teacher: Callable | None) -> Callable | None:
    """Wrap what training calls, in this process.

    Args:
        stopwatch: that counts.
        teacher: `Job.teacher`.

    Returns:
        The same factory of a teacher that is timed.
    """
    products = _HeadProducts(stopwatch)

    def watched(name: str, function: Callable) -> Callable:
        function = stopwatch.timed(name, function)

        def wrapped(*args, **kwargs):
            with products if stopwatch.running else contextlib.nullcontext():
                return function(*args, **kwargs)

        return wrapped

    def build(distiller, *args, original=engines.build):
        body = models.transformer(distiller.student)
        body.forward = stopwatch.timed("student_forward", body.forward)
        distiller.method.forward = watched("loss", distiller.method.forward)
        engine = original(distiller, *args)
        engine.backward = watched("backward", engine.backward)
        engine.step = stopwatch.timed("optimizer", engine.step)
        return engine

    engines.build = build
    batches.collate = stopwatch.timed("collate", batches.collate)
    for function in _TRANSPORT:
        wrapped = stopwatch.timed("optimal_transport", function)
        for name, module in list(sys.modules.items()):
            if name.startswith("kdbench.") and vars(module).get(function.__name__) is function:
                setattr(module, function.__name__, wrapped)
    if teacher is None:
        return None

    def timed_teacher(device):
        source = teacher(device)
        products.weight = source.head(device).weight.untyped_storage().data_ptr()
        return _Teacher(source, stopwatch)

    return timed_teacher
