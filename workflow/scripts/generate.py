"""Let a model answer the prompts of a data set, once with each decode seed."""

import argparse
import json
import os
import sys
from pathlib import Path

from kdbench import cli, files, progress
from kdbench.data import records
from kdbench.evaluation import predictions
from kdbench.settings import Decoding, Hardware, Text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model: full weights or a LoRA adapter")
    parser.add_argument("--records", required=True, metavar="FOLDER", help="records to answer")
    parser.add_argument("--settings", required=True, type=json.loads, metavar="JSON", help="`decoding` and `text`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="decode seeds")
    parser.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    parser.add_argument(
        "--output",
        required=True,
        nargs="+",
        metavar="FILE",
        help="predictions.jsonl to write, one for each decode seed",
    )
    options = parser.parse_args()
    if len(options.output) != len(options.seeds):
        parser.error(f"{len(options.seeds)} --seeds need as many files of --output")
    made = {seed: Path(path) for seed, path in zip(options.seeds, options.output, strict=True)}
    wanted = {seed: predictions.identity(options.model, options.records, options.settings, seed) for seed in made}
    missing = [seed for seed, path in made.items() if not predictions.is_made_from(path, wanted[seed])]
    for seed in made.keys() - set(missing):
        print(f"{made[seed]}: kept, it is of this very model, data and settings", file=sys.stderr)
        os.utime(made[seed])  # as new as its inputs, for those who compare times
    if missing:
        _generate(options, {seed: made[seed] for seed in missing}, wanted)


def _generate(options, made: dict[int, Path], wanted: dict[int, dict]) -> None:
    from kdbench.evaluation import generation

    hardware = Hardware.model_validate_json(options.hardware)
    decoding = Decoding.model_validate(options.settings["decoding"])
    text = Text.model_validate(options.settings["text"])
    writer = generation.load(options.model, hardware, decoding, text)
    answers = generation.generate(
        writer,
        records.load(files.folder_of(options.records)),
        decoding,
        text,
        list(made),
        progress.over("answers", "record", "records"),
    )
    for seed, path in made.items():
        predictions.write(path, answers[seed], wanted[seed])


cli.run(main)
