"""ROUGE-L of a set of answers, per item and in all."""

import argparse

from kdbench import cli, files
from kdbench.evaluation import predictions, rouge


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", required=True, metavar="FILE", help="predictions.jsonl")
    parser.add_argument("--stemmer", action="store_true", help="compare Porter stems, as published")
    parser.add_argument("--output", required=True, metavar="FILE", help="scores.json to write")
    options = parser.parse_args()
    files.write_json(options.output, rouge.score(predictions.read(options.predictions), options.stemmer))


cli.run(main)
