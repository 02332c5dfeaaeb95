"""Tokenise records for one model, or for a student and a teacher who must read the same bytes."""

import argparse

from kdbench import cli, files, models
from kdbench.alignment.vocabulary import texts_of
from kdbench.data import records, tokens
from kdbench.errors import UserError
from kdbench.settings import Text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", required=True, help="folder of records")
    parser.add_argument("--models", required=True, nargs="+", help="folder of the student and, if any, of the teacher")
    parser.add_argument(
        "--text", required=True, metavar="JSON", help="`text` of the configuration: template and lengths"
    )
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    parser.add_argument(
        "--one-tokenizer",
        nargs="*",
        default=[],
        metavar="METHOD",
        help="methods for which both must share their tokenizer",
    )
    options = parser.parse_args()
    source = files.read_manifest(options.records, "records")
    student, teacher = [*(models.load_tokenizer(files.folder_of(folder)) for folder in options.models), None][:2]
    made = tokens.tokenize(
        records.load(files.folder_of(options.records)), student, teacher, Text.model_validate_json(options.text)
    )
    if options.one_tokenizer and not made.same_tokenizer:
        raise UserError(
            f"{' and '.join(str(files.folder_of(folder)) for folder in options.models)} have different tokenizers; "
            f"{', '.join(options.one_tokenizer)} cannot work for this pair: take such methods out of the experiment"
        )
    read_by = {"student": student} | ({"teacher": teacher} if teacher else {})
    made.save(
        files.folder_of(options.output),
        records=source["fingerprint"],
        tokenizers={name: texts_of(tokenizer).fingerprint for name, tokenizer in read_by.items()},
    )


cli.run(main)
