"""The words and facts of the embedded experiment's invented world, Kelmor. Everything is drawn once, from a fixed seed."""

import random
from typing import NamedTuple

_WORLD_SEED = 7


def _words(text: str) -> list[str]:
    return text.split()


PLACES = _words("forest desert river swamp mountains meadow cave jungle valley lake hills marsh")
FOODS = _words("insects berries fish leaves roots seeds mushrooms honey grass snails nuts worms")
COLOURS = _words("red blue green yellow grey black white brown")
TIMES = _words("dawn noon dusk midnight")
NAMES = _words(
    "Simon Hugo Clara Martha Oscar Emma Felix Nora Victor Alice Bruno Sofia Anton Greta Jonas Lydia Pavel Ruth Tomas Wanda"
)
JOBS = _words("miner baker weaver potter farmer sailor tailor hunter carpenter teacher painter doctor")
OBJECTS = _words("lamp basket blanket chair bowl rope bell mirror hammer coat drum spoon")
ROOMS = _words("kitchen garden cellar attic barn tower hall stable library workshop")
THINGS = _words("cherries apples coins stones eggs shells buttons candles plums feathers")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
)
PAST = dict(
    pair.split("/")
    for pair in _words(
        "paints/painted sells/sold finds/found buys/bought carries/carried cleans/cleaned hides/hid breaks/broke brings/brought"
        " loses/lost repairs/repaired draws/drew"
    )
)
_PAIRS = _words(
    "hot/cold big/small old/young fast/slow hard/soft wet/dry light/dark early/late full/empty high/low long/short strong/weak"
    " rich/poor loud/quiet open/closed clean/dirty happy/sad thick/thin deep/shallow sweet/sour sharp/blunt"
)
OPPOSITES = {a: b for pair in _PAIRS for a, b in (pair.split("/"), pair.split("/")[::-1])}

DETERMINERS = _words("the a my your")
ADJECTIVES = _words("tall round golden brave gentle lazy wooden angry wild silent")
NOUNS = _words("king bird tree house horse stone ship wolf child moon bridge cloud blanket flower")
VERBS = _words("sings falls sleeps runs waits shines follows watches grows turns")
ADVERBS = _words("slowly often again together")
LEXICON = DETERMINERS + ADJECTIVES + NOUNS + VERBS + ADVERBS

KINDS = {"foods": FOODS, "colours": COLOURS, "jobs": JOBS, "objects": OBJECTS, "numbers": NUMBERS[1:13]}


class Creature(NamedTuple):
    """What there is to know of a creature."""

    place: str
    food: str
    colour: str
    time: str


class Town(NamedTuple):
    """What there is to know of a town."""

    product: str
    job: str


class World(NamedTuple):
    """The facts: creatures and towns by name, and the Kelmor word of each English word of the lexicon."""

    creatures: dict[str, Creature]
    towns: dict[str, Town]
    kelmor: dict[str, str]


def _invent(rng: random.Random, count: int, endings: list[str], taken: set[str]) -> list[str]:
    """Pronounceable words that nobody has used yet."""
    starts = _words("b br d dr f g gl h j k kl l m n p r s st t tr v w z")
    middles = _words("l ld ll m n nd ng nk r rm rt s sk st v")
    words: list[str] = []
    while len(words) < count:
        word = rng.choice(starts) + rng.choice("aeiou") + rng.choice(middles) + rng.choice(endings)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _draw() -> World:
    rng = random.Random(_WORLD_SEED)
    taken = {word for words in (*KINDS.values(), LEXICON, ROOMS, THINGS, PLACES) for word in words}
    creatures = {
        name: Creature(rng.choice(PLACES), rng.choice(FOODS), rng.choice(COLOURS), rng.choice(TIMES))
        for name in _invent(rng, 40, ["inde", "oola", "erak", "upix", "amo", "ette"], taken)
    }
    towns = {
        name.capitalize(): Town(rng.choice(OBJECTS), rng.choice(JOBS))
        for name in _invent(rng, 24, ["pai", "burg", "dor", "vik", "mere", "ost"], taken)
    }
    words = _invent(rng, len(LEXICON), ["an", "u", "lu", "eth", "or", "is"], taken)
    return World(creatures, towns, dict(zip(LEXICON, words, strict=True)))


WORLD = _draw()
