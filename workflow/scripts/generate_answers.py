"""Let a teacher answer the training prompts: a data set for methods that learn from its texts."""

import argparse

from kdbench import cli, files, progress
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
    text = Text.model_validate(identity["text"])
    writer = generation.load(options.model, hardware, decoding, text)
    answered, dropped = generation.answers(
        writer,
        records.load(files.folder_of(options.records)),
        decoding,
        text,
        settings["seed"],
        progress.over("answers", "record", "records"),
    )
    records.write(files.folder_of(options.output), answered, empty_answers=dropped)


cli.run(main)
