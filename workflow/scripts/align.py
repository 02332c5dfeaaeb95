"""Pair the response tokens of student and teacher that cover the same bytes, and say how many do."""

import argparse

from kdbench import cli, files
from kdbench.alignment.pairs import align, quality
from kdbench.data.tokens import Tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", required=True, help="folder of tokens of both models")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    source = files.read_manifest(options.tokens, "tokens")
    tokens = Tokens.load(files.folder_of(options.tokens))
    pairs = align(tokens)
    pairs.save(files.folder_of(options.output), quality(tokens, pairs), tokens=source["fingerprint"])


cli.run(main)
