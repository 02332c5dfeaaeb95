"""Generate a data set, or read it from a file, check it row by row, and write it as records.jsonl with a manifest."""

import argparse

from pydantic import TypeAdapter

from kdbench import cli, files
from kdbench.data import records
from kdbench.settings import Data


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, metavar="JSON", help="an entry of `datasets` of the configuration")
    parser.add_argument("--name", required=True, help="name of the data set; records are called name/row")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    records.prepare(TypeAdapter(Data).validate_json(options.source), options.name, files.folder_of(options.output))


cli.run(main)
