"""Tokenise records for one model, or for a student and a teacher who must read the same bytes."""

import argparse

from kdbench import cli, files, models
from kdbench.data import records, tokens
from kdbench.settings import Text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", required=True, help="folder of records")
    parser.add_argument("--models", required=True, nargs="+", help="folder of the student and, if any, of the teacher")
    parser.add_argument(
        "--text", required=True, metavar="JSON", help="`text` of the configuration: template and lengths"
    )
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    source = files.read_manifest(options.records, "records")
    student, teacher = [*(models.load_tokenizer(files.folder_of(folder)) for folder in options.models), None][:2]
    made = tokens.tokenize(
        records.load(files.folder_of(options.records)), student, teacher, Text.model_validate_json(options.text)
    )
    made.save(files.folder_of(options.output), records=source["fingerprint"])


cli.run(main)
