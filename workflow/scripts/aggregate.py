"""The table: one row per experiment, model, method and objective; on request the long form and a page to read."""

import argparse
import json

from kdbench import cli, files
from kdbench.evaluation import tables


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        required=True,
        type=json.loads,
        metavar="JSON",
        help="what to show, in order, and the scores.csv of each",
    )
    parser.add_argument("--table", required=True, metavar="FILE", help="table.csv to write")
    parser.add_argument("--scores", metavar="FILE", help="scores.csv to write")
    parser.add_argument("--markdown", metavar="FILE", help="table.md to write")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="`decoding` and `text`, for the notes"
    )
    parser.add_argument(
        "--alignments", nargs="*", default=[], metavar="FOLDER", help="alignments of the pairs, for the notes"
    )
    options = parser.parse_args()
    if options.markdown and not options.settings:
        parser.error("--markdown needs --settings, for its notes")
    scores = tables.join(options.rows)
    table = tables.summarise(scores)
    tables.write_table(options.table, table)
    if options.scores:
        tables.write_csv(options.scores, scores)
    if options.markdown:
        alignments = {str(files.folder_of(path)): files.read_manifest(path, "alignment") for path in options.alignments}
        files.write_text(
            options.markdown, tables.to_markdown(table, tables.notes(options.settings, alignments, scores))
        )


cli.run(main)
