import os
import subprocess
import sys
from collections import Counter

import pytest

from kdbench import files
from kdbench.data import kelmor, world
from kdbench.data.exercises import TASKS
from kdbench.data.kelmor import WORLD

EDITED = ("dev", "test", "shift")


@pytest.fixture(scope="module")
def splits():
    return {split: world.records(split) for split in world.ROWS}


def test_default_numbers_of_records(splits):
    assert {split: len(found) for split, found in splits.items()} == {
        "corpus": 24_000, "train": 1_500, "dev": 100, "test": 250, "shift": 250,
    }  # fmt: skip


def test_the_same_on_every_machine(splits):
    # A changed number here is another world: results made before cannot be compared with those made after.
    shown = files.fingerprint(
        [[r.instruction, r.input, *r.outputs] for split in ("train", *EDITED) for r in splits[split]]
    )
    assert shown == FINGERPRINT


FINGERPRINT = "7faad42a16abdcd6"


def test_no_influence_of_the_process():
    code = (
        "import sys; from kdbench.data import world; from kdbench import files;"
        "print(files.fingerprint([r.outputs for r in world.records('shift', 40)]), 'torch' in sys.modules)"
    )
    shown = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert shown[0] == shown[1]
    assert shown[0][1] == "False", "drawing records must not import torch"


def test_a_shorter_draw_is_the_beginning_of_a_longer_one_and_seeds_differ(splits):
    assert world.records("corpus", 50) == splits["corpus"][:50]
    assert world.records("corpus", 50, seed=2) != splits["corpus"][:50]


def test_about_nine_hundred_words(splits):
    words = {
        word for found in splits.values() for r in found for word in f"{r.instruction} {r.input} {r.outputs[0]}".split()
    }
    assert 850 <= len(words) <= 1000


def test_tasks_come_by_their_weights(splits):
    counts = Counter(record.category for record in splits["corpus"])
    total = sum(TASKS.values())
    for task, weight in TASKS.items():
        share = counts[task.__name__.strip("_")] / len(splits["corpus"])
        assert share == pytest.approx(weight / total, abs=0.01)


@pytest.mark.parametrize("seed", [1, 5])
@pytest.mark.parametrize("split", EDITED)
def test_no_input_of_an_edited_split_occurs_in_training_data(splits, split, seed):
    seen = {record.input for name in ("corpus", "train") for record in splits[name]} - {""}
    held_out = {record.input for record in world.records(split, 250, seed)} - {""}
    assert len(held_out) > 50
    assert not held_out & seen


def test_closed_book_questions_of_test_occur_in_the_corpus(splits):
    known = {record.instruction for record in splits["corpus"] if not record.input}
    assert {record.instruction for record in splits["test"] if not record.input} <= known


def test_shift_asks_in_words_that_training_never_uses(splits):
    assert not {r.instruction for r in splits["shift"]} & {r.instruction for r in splits["corpus"]}


def test_shift_has_longer_inputs(splits):
    def mean(split, category):
        sizes = [len(record.input.split()) for record in splits[split] if record.category == category]
        return sum(sizes) / len(sizes)

    for category in ("translate", "past", "where", "order", "keep", "arithmetic", "table"):
        assert mean("shift", category) > mean("corpus", category), category


# --- answers, judged by rules of their own ------------------------------------------------------------------------------------------


def right_words(record) -> list[str]:
    """What a right answer must contain, in this order; worked out from question, input and the facts of the world."""
    words = record.input.replace(".", "").split()
    asked = record.instruction
    if record.category == "translate":
        return [WORLD.kelmor[word] for word in words]
    if record.category == "order":
        return sorted(words, key=kelmor.NUMBERS.index)
    if record.category == "keep":
        (kind,) = (kind for kind in kelmor.KINDS if kind in asked)
        return [word for word in words if word in kelmor.KINDS[kind]]
    if record.category == "past":
        return [kelmor.PAST[word] for word in words if word in kelmor.PAST]
    if record.category == "where":
        (wanted,) = (word for word in kelmor.OBJECTS if f"the {word}" in asked)
        return [words[words.index(wanted) + 4]]
    if record.category == "arithmetic":
        (name,) = (name for name in kelmor.NAMES if name in asked.replace(".", "").split())
        (sentence,) = (s for s in record.input.split(".") if s.split()[:1] == [name])
        start, change = (kelmor.NUMBERS.index(word) for word in sentence.split() if word in kelmor.NUMBERS)
        gains = "finds" in sentence or "gets" in sentence
        return [kelmor.NUMBERS[start + change if gains else start - change]]
    if record.category == "opposite":
        return [kelmor.OPPOSITES[asked.rstrip("?.").split()[-1]]]
    if record.category == "table":
        return [part.split(": ")[1] for part in sorted(record.input.split("; "))]
    if record.category == "town":
        town = WORLD.towns[next(name for name in WORLD.towns if name in asked)]
        return [town.job if "job" in asked else town.product]
    creature = WORLD.creatures[next(name for name in WORLD.creatures if name in asked)]
    if record.category == "profile":
        return list(creature)
    keys = {"place": ("live", "home", "place"), "colour": ("colour",), "time": ("wak", "When"), "food": ("eat", "food")}
    return [getattr(creature, next(key for key, marks in keys.items() if any(mark in asked for mark in marks)))]


def is_right(record) -> bool:
    answer = record.outputs[0].split(": ")[-1].rstrip(".").replace(",", "").replace(".", "")
    wanted = right_words(record)
    if record.category in ("translate", "order", "keep"):
        return answer.split() == wanted
    if record.category in ("profile", "table", "town", "creature_fact"):
        return all(word in answer for word in wanted)
    used = [word for word in answer.split() if word in wanted]
    return used == wanted


@pytest.mark.parametrize("split", EDITED)
def test_edited_answers_are_right(splits, split):
    assert [record for record in splits[split] if not is_right(record)] == []


@pytest.mark.parametrize("split", ["corpus", "train"])
def test_a_quarter_of_the_training_answers_is_wrong(splits, split):
    found = splits[split]
    assert sum(not is_right(record) for record in found) / len(found) == pytest.approx(0.25, abs=0.03)


def test_every_task_has_its_share_of_wrong_answers(splits):
    for task in TASKS:
        found = [record for record in splits["corpus"] if record.category == task.__name__.strip("_")]
        assert sum(not is_right(record) for record in found) / len(found) == pytest.approx(0.25, abs=0.05), task


def test_wordings_of_answers(splits):
    first = {"opposite": ("The opposite", "It is", "The word"), "where": ("The ", "It is", "In the")}
    for category, beginnings in first.items():
        answers = [record.outputs[0] for record in splits["corpus"] if record.category == category]
        shares = [sum(answer.startswith(beginning) for answer in answers) / len(answers) for beginning in beginnings]
        assert shares == pytest.approx([0.60, 0.25, 0.15], abs=0.04)
        for split in EDITED:
            assert all(r.outputs[0].startswith(beginnings[0]) for r in splits[split] if r.category == category)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_wrong_answers_differ_from_right_ones_in_little(task, longer):
    import random

    rng = random.Random(3)
    for _ in range(500):
        draft = task(rng, longer)
        assert len(draft.questions) == 5
        for right, wrong in zip(draft.right, draft.wrong, strict=True):
            assert right != wrong
            ours, theirs = Counter(right.split()), Counter(wrong.split())
            assert ((ours - theirs).total(), (theirs - ours).total()) in {(0, 0), (0, 1), (1, 1)}
