"""The table: one row per experiment, model, method and objective; on request the long form and a page to read."""

import argparse
import json

from kdbench import cli, files
from kdbench.evaluation import comparisons, latex, tables


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        required=True,
        type=json.loads,
        metavar="JSON",
        help="what to show, in order, with the scores.csv and items.csv of each",
    )
    parser.add_argument("--table", required=True, metavar="FILE", help="table.csv to write")
    parser.add_argument("--scores", metavar="FILE", help="scores.csv to write")
    parser.add_argument("--comparisons", metavar="FILE", help="comparisons.csv to write")
    parser.add_argument("--markdown", metavar="FILE", help="table.md to write")
    parser.add_argument("--latex", metavar="FILE", help="table.tex to write")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="`decoding` and `text`, for the notes"
    )
    parser.add_argument(
        "--alignments", nargs="*", default=[], metavar="FOLDER", help="alignments of the pairs, for the notes"
    )
    options = parser.parse_args()
    if (options.markdown or options.latex) and not options.settings:
        parser.error("--markdown and --latex need --settings, for their notes")
    scores, runs = tables.join(options.rows), comparisons.Runs(options.rows)
    table, differences = tables.summarise(scores, runs), comparisons.compare(runs)
    tables.write_table(options.table, table)
    if options.scores:
        tables.write_csv(options.scores, scores)
    if options.comparisons:
        tables.write_csv(options.comparisons, differences)
    if options.markdown or options.latex:
        alignments = {str(files.folder_of(path)): files.read_manifest(path, "alignment") for path in options.alignments}
        notes = tables.notes(options.settings, alignments, scores)
        for path, write in ((options.markdown, tables.to_markdown), (options.latex, latex.to_latex)):
            if path:
                files.write_text(path, write(table, differences, notes))


cli.run(main)
