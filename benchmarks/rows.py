"""What a measurement reads, made by the library as the workflow makes it, once for all measurements of a run.

The folder of a run holds

    <pair>/                student/, teacher/: models in Hugging Face format
    <pair>/<batch size>/   tokens/, alignment/, spelling/, cache/ (see docs/architecture.md)
    vocabulary/            the relation of the two tokenizers
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.shapes import PADDED, SEED, SHAPES, TOKENIZERS, Shapes, is_real, shared, with_vocabulary
from kdbench import cli, files, models
from kdbench.alignment import pairs, spelling, vocabulary
from kdbench.data import batches, records, tokens
from kdbench.data.records import Record
from kdbench.settings import Hardware, InitModel, Text, TrainedTokenizer
from kdbench.teacher import cached

_DRAWN = 400  # records that the batch is chosen among
_BATCHES = 500  # batches that it is chosen among
# deciles, from the shortest to the longest, of the words in a Dolly record's instruction and input together, and in its response
_ASKED = (1, 5, 7, 8, 9, 11, 13, 19, 38, 98, 185)
_SAID = (1, 6, 10, 15, 21, 31, 45, 63, 88, 138, 400)


@dataclass(frozen=True)
class Pair:
    """Which tokenizers student and teacher read with.

    Attributes:
        student: number of the student's tokenizer: 0 as GPT2's, 1 as Qwen1.5's, 2 as TinyLLaMA's.
        teacher: number of the teacher's.
        head: rows of both heads, or None for those of the shapes.
    """

    student: int
    teacher: int
    head: int | None = None


PAIRS = {
    "cross": Pair(0, 1),
    "same": Pair(0, 0),
    "32k": Pair(2, 2, 32_000),
    "152k": Pair(1, 1, 151_936),
}


def generated(count: int) -> list[Record]:
    """Records of random words whose numbers of words are spread as Dolly's are."""
    generator = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(2, 10, 5000)]
    common = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    shares = np.linspace(0, 1, len(_ASKED))

    def text(deciles: Sequence[int]) -> str:
        size = int(np.interp(generator.random(), shares, deciles))
        return " ".join(generator.choice(words, size, p=common / common.sum()))

    return [Record(f"generated/{row}", "Go on.", text(_ASKED), None, (text(_SAID),)) for row in range(1, count + 1)]


def sources(shapes: Shapes) -> list[Record]:
    """The records that the batches are drawn from."""
    if is_real(shapes):
        return records.read_jsonl(shared() / "data" / "dolly" / "train.jsonl", rows=_DRAWN)
    return generated(_DRAWN if shapes.real else 60)


def tokenizer(shapes: Shapes, number: int, found: list[Record]):
    """A real tokenizer, or one that is trained on the records."""
    if is_real(shapes):
        return models.load_tokenizer(shared() / "tokenizers" / TOKENIZERS[number])
    size = shapes.trained[number % len(shapes.trained)]
    texts = (f"{record.input} {record.outputs[0]}" for record in found)
    return models.train_tokenizer(texts, TrainedTokenizer(train_on="records", vocabulary_size=size))


def typical(sides: tokens.TokenSide, batch_size: int) -> list[int]:
    """The batch that is nearest to the mean of many random ones, in tokens, response tokens and length of the longest sequence.

    An epoch takes as long as its number of steps times the mean of a step; and steps of one batch, unlike those of many, differ by
    nothing but noise.
    """
    generator = np.random.default_rng(SEED)
    drawn = np.stack([generator.choice(sides.rows, batch_size, replace=False) for _ in range(_BATCHES)])
    lengths, responses = sides.lengths[drawn], sides.response_counts[drawn]
    sizes = np.stack([lengths.sum(1), responses.sum(1), lengths.max(1)], axis=1)
    return drawn[np.abs(sizes / sizes.mean(0) - 1).sum(1).argmin()].tolist()


def repeated(rows: Sequence, steps: int) -> list:
    """A data set whose every step, in the order that training takes, reads these rows."""
    order = [row for step in batches.schedule(len(rows) * steps, len(rows), 0, SEED) for row in step]
    made = [None] * len(order)
    for place, row in enumerate(order):
        made[row] = rows[place % len(rows)]
    return made


def prepare(folder: Path, shapes: Shapes, name: str, batch_size: int, steps: int, cache: bool) -> None:
    """Make all that measurements of one pair and batch size read; nothing where it is there already.

    Args:
        folder: of the run.
        shapes: of the models.
        name: key of `PAIRS`.
        batch_size: records of a step.
        steps: that a measurement may take.
        cache: whether the teacher's cache is wanted, too.
    """
    pair, place = PAIRS[name], folder / name / str(batch_size)
    made = place / "made.json"
    models.quiet()
    if not made.exists() or files.read_json(made)["steps"] < steps:
        shutil.rmtree(place, ignore_errors=True)
        found = sources(shapes)
        readers = [tokenizer(shapes, number, found) for number in (pair.student, pair.teacher)]
        _write_models(place.parent, shapes, pair, readers)
        _write_tokens(place, found, readers, batch_size, steps)
        if pair.student != pair.teacher and not (folder / "vocabulary" / files.MANIFEST).exists():
            vocabulary.save(folder / "vocabulary", vocabulary.relate(*map(vocabulary.texts_of, readers)))
        files.write_json(made, {"steps": steps})
    if cache and not (place / "cache" / files.MANIFEST).exists():
        teacher, reader = models.for_inference(place.parent / "teacher", Hardware(gpus=0))
        cached.write(
            place / "cache",
            teacher,
            len(reader),
            tokens.Tokens.load(place / "tokens").teacher,
            "bfloat16",
            batch_size,
            teacher_fingerprint=files.read_manifest(place.parent / "teacher", "model")["fingerprint"],
            tokens_fingerprint=files.read_manifest(place / "tokens", tokens.KIND)["fingerprint"],
        )


def _write_tokens(place: Path, found: list[Record], readers: list, batch_size: int, steps: int) -> None:
    text = Text(max_tokens=PADDED)
    chosen = typical(tokens.tokenize(found, readers[0], None, text).student, batch_size)
    made = tokens.tokenize(repeated([found[row] for row in chosen], steps), *readers, text)
    made.save(place / "tokens")
    if not made.same_tokenizer:
        fingerprint = files.read_manifest(place / "tokens", tokens.KIND)["fingerprint"]
        aligned = pairs.align(made)
        aligned.save(place / "alignment", pairs.quality(made, aligned), tokens=fingerprint)
        spelt = spelling.spell(made, *(vocabulary.texts_of(reader).texts for reader in readers))
        spelt.save(place / "spelling", tokens=fingerprint)


def _write_models(folder: Path, shapes: Shapes, pair: Pair, readers: list) -> None:
    shapes = shapes if pair.head is None or not shapes.real else with_vocabulary(shapes, pair.head)
    heads = shapes.vocabularies[0], shapes.vocabularies[int(pair.teacher != pair.student)]
    for kind, reader, head in zip(("student", "teacher"), readers, heads, strict=True):
        if (folder / kind / files.MANIFEST).exists():
            continue
        architecture = getattr(shapes, kind) | {"vocab_size": head}
        model = models.create(InitModel(source="init", architecture=architecture, tokenizer="-", seed=SEED), reader)
        part = files.fresh_folder(folder / kind)
        model.save_pretrained(part)
        reader.save_pretrained(part)
        files.write_manifest(part, "model")
        files.finish_folder(folder / kind)


def main():
    parser = argparse.ArgumentParser(description="Make all that measurements read; nothing where it is there already.")
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("steps", type=int, help="that a measurement may take")
    parser.add_argument("wanted", nargs="+", metavar="PAIR/BATCH", help=f"{', '.join(PAIRS)}; records of a step")
    parser.add_argument(
        "--cached", nargs="*", default=[], metavar="PAIR/BATCH", help="those whose teacher's cache is wanted, too"
    )
    options = parser.parse_args()
    for wanted in options.wanted:
        name, batch_size = wanted.split("/")
        cache = wanted in options.cached
        prepare(options.folder, SHAPES[options.shapes], name, int(batch_size), options.steps, cache)


if __name__ == "__main__":
    cli.run(main)
