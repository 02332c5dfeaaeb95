"""Records of the invented world Kelmor: data for the embedded experiment, made by code, the same on every machine.

A quarter of the answers in `corpus` and `train` carries one wrong detail, and answers come in three wordings, as in data that many
people wrote. A model that saw much averages this away; a small data set does not: here a student has something to learn from a
teacher that its labels do not tell. `dev`, `test` and `shift` are edited: right answers in the first wording.
"""

import random
import zlib
from collections.abc import Callable

from kdbench.data.exercises import TASKS, Draft
from kdbench.data.records import Record

ROWS = {"corpus": 24_000, "train": 1_500, "dev": 100, "test": 250, "shift": 250}
WRONG = 0.25  # share of unedited answers with a wrong detail
WORDINGS = (60, 25, 15)  # percent of unedited answers in each wording
_EDITED = {"dev", "test", "shift"}
_HELD_OUT = 8  # one input in so many is kept for the edited splits


def records(split: str, rows: int | None = None, seed: int = 1) -> list[Record]:
    """Records of one split.

    An edited split shares no input with `corpus` or `train`, whatever the seeds: which inputs are held out is decided by the input alone.
    `shift` asks in other words than the rest and has longer inputs.

    Args:
        split: "corpus" (for the teacher), "train" (for students), "dev", "test" or "shift".
        rows: how many; by default the split's own number (`ROWS`).
        seed: of the draw; the facts of the world never change.
    """
    rng = random.Random(f"{split}/{seed}")
    tasks, weights = list(TASKS), list(TASKS.values())
    edited, longer = split in _EDITED, split == "shift"
    found = []
    for row in range(1, (rows or ROWS[split]) + 1):
        task = rng.choices(tasks, weights)[0]
        draft = _draft(task, rng, longer, edited)
        question = rng.choice(draft.questions[3:] if longer else draft.questions[:3])
        (wording,) = rng.choices((0, 1, 2), WORDINGS)
        wrong = rng.random() < WRONG
        answer = draft.right[0] if edited else (draft.wrong if wrong else draft.right)[wording]
        found.append(Record(f"{split}/{row}", question, draft.input, None, (answer,), task.__name__.strip("_")))
    return found


def _draft(task: Callable, rng: random.Random, longer: bool, held_out: bool) -> Draft:
    while True:
        draft = task(rng, longer)
        if not draft.input or (zlib.crc32(draft.input.encode()) % _HELD_OUT == 0) == held_out:
            return draft
