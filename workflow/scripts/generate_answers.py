"""Let a teacher answer the training prompts: a data set for methods that learn from its texts."""

import argparse

from kdbench import cli, files, models, progress
from kdbench.data import records
from kdbench.evaluation import generation
from kdbench.settings import Decoding, Hardware, Text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="config.json of the method; its settings say how to answer"
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the teacher")
    parser.add_argument("--records", required=True, metavar="FOLDER", help="the training records")
    parser.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    identity = files.read_json(options.config)
    settings = identity["method"]["settings"]
    hardware = Hardware.model_validate_json(options.hardware)
    decoding = Decoding(**{key: settings[key] for key in settings.keys() & Decoding.model_fields.keys()})
    model, tokenizer = models.for_inference(options.model, hardware, decoding.precision)
    asked = records.load(files.folder_of(options.records))
    answered, dropped = generation.answers(
        model,
        tokenizer,
        asked,
        decoding,
        Text.model_validate(identity["text"]),
        settings["seed"],
        hardware.generation_batch_size,
        progress.over("answers"),
    )
    records.write(files.folder_of(options.output), answered, empty_answers=dropped)


cli.run(main)
