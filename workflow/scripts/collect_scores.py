"""The scores of one model, or of a method's students, as one long table: a row per training seed, data set and decode seed."""

import argparse

from kdbench import cli
from kdbench.evaluation import tables


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", required=True, nargs="+", metavar="FILE", help="scores.json files")
    parser.add_argument("--output", required=True, metavar="FILE", help="scores.csv to write")
    parser.add_argument("--items", required=True, metavar="FILE", help="items.csv to write: the same, record by record")
    options = parser.parse_args()
    tables.write_csv(options.output, tables.collect(options.scores))
    tables.write_csv(options.items, tables.items(options.scores))


cli.run(main)
