"""Measurements on request, each in a process of its own that is forked from one which has everything imported.

Imports take longer than many a measurement. What they occupy counts as the child's memory all the same, and its peak begins anew.
Reads the arguments of `benchmarks.measure` from each line of stdin, as a JSON list, and answers with an exit code.
"""

import importlib
import json
import os
import signal
import sys
import traceback

from benchmarks import measure
from kdbench import cli

_LIMIT = 600  # seconds after which a measurement is given up
_IMPORTED = (
    "benchmarks.floor",
    "benchmarks.stopwatch",
    "kdbench.training.run",
    "kdbench.teacher.cached",
    "kdbench.teacher.live",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
)


def main():
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(_LIMIT)
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # answers alone go there
            _measure(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _measure(arguments: list[str]) -> None:
    """Measure, and end this process without what the parent has still to do."""
    code = 1
    try:
        measure.main(arguments)
        code = 0
    except BaseException:  # also SystemExit: the parent's loop must not go on in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    cli.run(main)
