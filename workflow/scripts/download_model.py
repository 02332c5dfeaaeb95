"""Bring a model into a folder of its own: from the hub, from a local folder (linked), or initialised from a seed."""

import argparse

from pydantic import TypeAdapter

from kdbench import cli, files, sources
from kdbench.settings import Model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, metavar="JSON", help="an entry of `models` of the configuration")
    parser.add_argument(
        "--text", metavar="RECORDS", help="records to train the model's tokenizer on, if it is to have its own"
    )
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    sources.fetch(TypeAdapter(Model).validate_json(options.source), files.folder_of(options.output), options.text)


cli.run(main)
