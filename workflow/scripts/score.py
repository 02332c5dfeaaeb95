"""ROUGE-L of sets of answers, per item and in all."""

import argparse

from kdbench import cli, files
from kdbench.evaluation import predictions, rouge


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--predictions", required=True, nargs="+", metavar="FILE", help="predictions.jsonl of each set of answers"
    )
    parser.add_argument("--stemmer", action="store_true", help="compare Porter stems, as published")
    parser.add_argument(
        "--output", required=True, nargs="+", metavar="FILE", help="scores.json to write, one for each set"
    )
    options = parser.parse_args()
    if len(options.output) != len(options.predictions):
        parser.error(f"{len(options.predictions)} files of --predictions need as many of --output")
    for answers, scores in zip(options.predictions, options.output, strict=True):
        files.write_json(scores, rouge.score(predictions.read(answers), options.stemmer))


cli.run(main)
