"""Let a model answer the prompts of a data set."""

import argparse
import json

from kdbench import cli, files, models, progress
from kdbench.data import records
from kdbench.evaluation import generation, predictions
from kdbench.settings import Decoding, Hardware, Text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model: full weights or a LoRA adapter")
    parser.add_argument("--records", required=True, metavar="FOLDER", help="records to answer")
    parser.add_argument("--settings", required=True, type=json.loads, metavar="JSON", help="`decoding` and `text`")
    parser.add_argument("--seed", type=int, default=0, help="decode seed")
    parser.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    parser.add_argument("--output", required=True, metavar="FILE", help="predictions.jsonl to write")
    options = parser.parse_args()
    hardware = Hardware.model_validate_json(options.hardware)
    decoding = Decoding.model_validate(options.settings["decoding"])
    model, tokenizer = models.for_inference(options.model, hardware, decoding.precision)
    answers = generation.generate(
        model,
        tokenizer,
        records.load(files.folder_of(options.records)),
        decoding,
        Text.model_validate(options.settings["text"]),
        options.seed,
        hardware.generation_batch_size,
        progress.over("answers"),
    )
    predictions.write(options.output, answers)


cli.run(main)
