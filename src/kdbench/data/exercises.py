"""The exercises of the invented world Kelmor: each draws a question, its input and its answers, right and with one wrong detail."""

import random
from typing import NamedTuple

from kdbench.data import kelmor
from kdbench.data.kelmor import WORLD


class Draft(NamedTuple):
    """A drawn exercise.

    Attributes:
        questions: five wordings of the instruction: three for training and test, two for `shift`.
        input: the instruction's input, often empty.
        right: the answer in three wordings.
        wrong: the same with one wrong detail.
    """

    questions: tuple[str, ...]
    input: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def _other(rng: random.Random, values, value: str) -> str:
    return rng.choice([other for other in values if other != value])


def _swapped(rng: random.Random, words: list[str]) -> list[str]:
    """Two neighbours exchanged."""
    at = rng.randrange(len(words) - 1)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def _filled(wordings, *details: dict):
    """The wordings with each set of details in turn."""
    return tuple(tuple(wording.format(**detail) for wording in wordings) for detail in details)


_FACTS = {
    "place": (
        kelmor.PLACES,
        "Where does the {name} live?|In which place does the {name} live?|Name the home of the {name}."
        "|Tell me where the {name} lives.|In which place is the home of the {name}?",
        "The {name} lives in the {value}.|It lives in the {value}.|Its home is the {value}.",
    ),
    "food": (
        kelmor.FOODS,
        "Which food does the {name} like?|What does the {name} eat?|Name the food of the {name}."
        "|Tell me what the {name} likes to eat.|Which food does the {name} eat?",
        "The {name} eats {value}.|It likes {value}.|Its food is {value}.",
    ),
    "colour": (
        kelmor.COLOURS,
        "Which colour has the {name}?|What colour is the {name}?|Name the colour of the {name}."
        "|Tell me the colour of the {name}.|Which colour is the {name}?",
        "The {name} is {value}.|It is {value}.|Its colour is {value}.",
    ),
    "time": (
        kelmor.TIMES,
        "When does the {name} wake up?|At what time does the {name} wake?|Name the waking time of the {name}."
        "|Tell me when the {name} wakes up.|At what time does the {name} wake up?",
        "The {name} wakes at {value}.|It wakes at {value}.|Its waking time is {value}.",
    ),
}


def _creature_fact(rng, longer):
    name, (kind, (values, questions, answers)) = rng.choice([*WORLD.creatures]), rng.choice([*_FACTS.items()])
    value = getattr(WORLD.creatures[name], kind)
    details = [{"name": name, "value": value}, {"name": name, "value": _other(rng, values, value)}]
    return Draft(*_filled(questions.split("|"), details[0]), "", *_filled(answers.split("|"), *details))


def _profile(rng, longer):
    name = rng.choice([*WORLD.creatures])
    facts = WORLD.creatures[name]._asdict()
    kind = rng.choice([*_FACTS])
    wrong = facts | {kind: _other(rng, _FACTS[kind][0], facts[kind])}
    questions = (
        "Describe the {name} in one sentence.",
        "Write one sentence about the {name}.",
        "What is known of the {name}?",
        "Describe what is known of the {name}.",
        "Write about the {name} in one sentence.",
    )
    answers = (
        "The {colour} {name} lives in the {place}, eats {food} and wakes at {time}.",
        "The {name} is {colour}, eats {food}, lives in the {place} and wakes at {time}.",
        "Waking at {time}, the {name} of the {place} is {colour} and likes {food}.",
    )
    details = {"name": name}
    return Draft(*_filled(questions, details), "", *_filled(answers, details | facts, details | wrong))


_TOWN = {
    "product": (
        kelmor.OBJECTS,
        "What do the people of {name} make?|Which object is made in {name}?|Name the product of {name}."
        "|Tell me what people make in {name}.|Which product do the people of {name} make?",
        "The people of {name} make {value}s.|They make {value}s.|Its product is the {value}.",
    ),
    "job": (
        kelmor.JOBS,
        "Which job do most people of {name} have?|What is the main job in {name}?|Name the main job of {name}."
        "|Tell me the job of most people in {name}.|Which main job do people have in {name}?",
        "Most people of {name} are {value}s.|They are {value}s.|Its main job is {value}.",
    ),
}


def _town(rng, longer):
    name, (kind, (values, questions, answers)) = rng.choice([*WORLD.towns]), rng.choice([*_TOWN.items()])
    value = getattr(WORLD.towns[name], kind)
    details = [{"name": name, "value": value}, {"name": name, "value": _other(rng, values, value)}]
    return Draft(*_filled(questions.split("|"), details[0]), "", *_filled(answers.split("|"), *details))


_PHRASES = ["DN", "DNV", "DAN", "DANV", "DNVE", "DANVE", "DNVDN"]
_CLASSES = dict(
    zip("DANVE", (kelmor.DETERMINERS, kelmor.ADJECTIVES, kelmor.NOUNS, kelmor.VERBS, kelmor.ADVERBS), strict=True)
)


def _translate(rng, longer):
    english = [rng.choice(_CLASSES[letter]) for letter in ("DANVDAN" if longer else rng.choice(_PHRASES))]
    words = [WORLD.kelmor[word] for word in english]
    at = rng.randrange(len(words))
    replaced = [*words[:at], _other(rng, WORLD.kelmor.values(), words[at]), *words[at + 1 :]]
    wrong = replaced if rng.random() < 0.5 else _swapped(rng, words)
    questions = (
        "Give the Kelmor translation of the input.",
        "Translate the input into Kelmor.",
        "How does one say the input in Kelmor?",
        "Give the input in Kelmor.",
        "Give the translation of the input into Kelmor.",
    )
    answers = _filled(
        ("{words}", "In Kelmor: {words}", "It is: {words}"), *({"words": " ".join(w)} for w in (words, wrong))
    )
    return Draft(questions, " ".join(english), *answers)


def _past(rng, longer):
    count = 3 if longer else 1
    names, verbs = rng.sample(kelmor.NAMES, count), rng.sample([*kelmor.PAST], count)
    objects = rng.sample(kelmor.OBJECTS, count)
    at, other = rng.randrange(count), rng.choice([*kelmor.PAST.values()])
    past = [kelmor.PAST[verb] for verb in verbs]
    wrong = [*past]
    wrong[at] = other if other != past[at] else verbs[at]
    before, right, false = (
        " ".join(f"{n} {v} the {o}." for n, v, o in zip(names, forms, objects, strict=True))
        for forms in (verbs, past, wrong)
    )
    questions = (
        "Put the sentence into the past tense.",
        "Write the input in the past tense.",
        "What is the past tense of the sentence?",
        "Put the input into the past tense.",
        "Give the past tense of the sentence.",
    )
    answers = _filled(("{text}", "In the past: {text}", "It was so: {text}"), {"text": right}, {"text": false})
    return Draft(questions, before, *answers)


def _table(rng, longer):
    pools = {"name": kelmor.NAMES, "town": [*WORLD.towns], "job": kelmor.JOBS, "object": kelmor.OBJECTS}
    facts = {key: rng.choice(pool) for key, pool in pools.items()}
    keys = [*pools] if longer or rng.random() < 0.5 else ["name", "town", "job"]
    changed = rng.choice(keys[1:])
    wrong = facts | {changed: _other(rng, pools[changed], facts[changed])}
    owns = " and has a {object}" if "object" in keys else ""
    if longer:
        rng.shuffle(keys)
    questions = (
        "Turn this table into one sentence.",
        "Write the table as a sentence.",
        "Make one sentence of the input.",
        "Make a sentence of this table.",
        "Turn the input into one sentence.",
    )
    answers = (
        f"The {{job}} {{name}} lives in {{town}}{owns}.",
        f"{{name}} is a {{job}} of {{town}}{owns}.",
        f"In {{town}} lives the {{job}} {{name}}{owns}.",
    )
    return Draft(questions, "; ".join(f"{key}: {facts[key]}" for key in keys), *_filled(answers, facts, wrong))


def _where(rng, longer):
    count = 3 if longer else 2
    objects, rooms = rng.sample(kelmor.OBJECTS, count), rng.sample(kelmor.ROOMS, count)
    at = rng.randrange(count)
    questions = (
        "Where is the {name}?",
        "In which room is the {name}?",
        "Find the {name}.",
        "Tell me where the {name} is.",
        "Which room has the {name}?",
    )
    answers = ("The {name} is in the {room}.", "It is in the {room}.", "In the {room}.")
    details = [{"name": objects[at], "room": room} for room in (rooms[at], _other(rng, rooms, rooms[at]))]
    text = " ".join(f"The {o} is in the {r}." for o, r in zip(objects, rooms, strict=True))
    return Draft(*_filled(questions, details[0]), text, *_filled(answers, *details))


def _arithmetic(rng, longer):
    first, others = rng.choice(kelmor.NAMES), rng.sample(kelmor.THINGS, 2)
    gains = rng.random() < 0.5
    start = rng.randint(1, 9) if gains else rng.randint(2, 18)
    change = rng.randint(1, 9) if gains else rng.randint(1, min(9, start))
    result = start + change if gains else start - change
    near = result + 1 if result == 0 or (result < 18 and rng.random() < 0.5) else result - 1
    verb = rng.choice(["finds", "gets"] if gains else ["loses", "sells"])
    text = f"{first} has {kelmor.NUMBERS[start]} {others[0]} and {verb} {kelmor.NUMBERS[change]}."
    if longer:
        second, third = rng.sample([name for name in kelmor.NAMES if name != first], 2)
        extra = [f"{second} has {rng.choice(kelmor.NUMBERS)} {others[1]}.", f"{third} is a {rng.choice(kelmor.JOBS)}."]
        text = " ".join(rng.sample([text, *extra], 3))
    questions = (
        "How many {things} has {name} now?",
        "How many {things} does {name} have in the end?",
        "Count the {things} of {name}.",
        "Tell me how many {things} {name} has.",
        "What number of {things} does {name} have now?",
    )
    answers = ("{name} has {number} {things} now.", "Now {name} has {number} {things}.", "There are {number} {things}.")
    details = [{"name": first, "things": others[0], "number": kelmor.NUMBERS[number]} for number in (result, near)]
    return Draft(*_filled(questions, details[0]), text, *_filled(answers, *details))


def _opposite(rng, longer):
    word = rng.choice([*kelmor.OPPOSITES])
    values = (kelmor.OPPOSITES[word], _other(rng, kelmor.OPPOSITES, kelmor.OPPOSITES[word]))
    questions = (
        "What is the opposite of {word}?",
        "Name the opposite of {word}.",
        "Which word is the opposite of {word}?",
        "Tell me the opposite of {word}.",
        "Give the opposite of the word {word}.",
    )
    answers = ("The opposite of {word} is {value}.", "It is {value}.", "The word is {value}.")
    details = [{"word": word, "value": value} for value in values]
    return Draft(*_filled(questions, details[0]), "", *_filled(answers, *details))


def _keep(rng, longer):
    kind = rng.choice([*kelmor.KINDS])
    kept = rng.sample(kelmor.KINDS[kind], rng.randint(2, 3))
    rest = [word for other, words in kelmor.KINDS.items() if other != kind for word in words]
    dropped = rng.sample(rest, (7 if longer else 5) - len(kept))
    words = rng.sample(kept + dropped, len(kept) + len(dropped))
    right = [word for word in words if word in kept]
    intruder = rng.choice(dropped)
    wrong = [word for word in words if word in kept or word == intruder]
    questions = (
        "Keep only the {kind}.",
        "Write only the words that are {kind}.",
        "Which words of the input are {kind}?",
        "Keep only the words that are {kind}.",
        "Write only the {kind}.",
    )
    answers = _filled(
        ("The {kind} are: {words}", "They are: {words}", "Kept: {words}"),
        *({"kind": kind, "words": " ".join(w)} for w in (right, wrong)),
    )
    return Draft(*_filled(questions, {"kind": kind}), " ".join(words), *answers)


def _order(rng, longer):
    numbers = rng.sample(range(len(kelmor.NUMBERS)), 4 if longer else 3)
    right = [kelmor.NUMBERS[number] for number in sorted(numbers)]
    questions = (
        "Sort the numbers.",
        "Write the numbers from small to large.",
        "Put the numbers in order.",
        "Sort the numbers from small to large.",
        "Write the numbers in order.",
    )
    wordings = ("In order: {words}", "The order is: {words}", "Sorted: {words}")
    answers = _filled(wordings, *({"words": " ".join(words)} for words in (right, _swapped(rng, right))))
    return Draft(questions, " ".join(kelmor.NUMBERS[number] for number in numbers), *answers)


TASKS = {
    _creature_fact: 5,
    _profile: 4,
    _town: 3,
    _translate: 3,
    _past: 2,
    _table: 2,
    _where: 2,
    _arithmetic: 2,
    _opposite: 2,
    _keep: 2,
    _order: 1,
}
