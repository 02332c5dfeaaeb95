"""Pair the response tokens of student and teacher that cover the same bytes, cut responses into chunks, and say how well they match."""

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
    shares = quality(tokens, pairs)
    pairs.save(files.folder_of(options.output), shares, tokens=source["fingerprint"])
    print(
        f"{files.folder_of(options.output)}: of {shares['student_tokens']:,} response tokens of the student in {shares['rows']:,} records "
        f"{shares['byte']:.1%} have one of the teacher with the same bytes, {shares['index']:.1%} one at the same position"
    )


cli.run(main)
