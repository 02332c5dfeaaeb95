"""Write down the identity of a teacher or of a method's runs: all that decides their numbers."""

import argparse
import json

from kdbench import cli, files


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identity", required=True, type=json.loads, metavar="JSON", help="the identity")
    parser.add_argument("--output", required=True, metavar="FILE", help="config.json to write")
    options = parser.parse_args()
    files.write_json(options.output, options.identity)


cli.run(main)
