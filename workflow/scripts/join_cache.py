"""Make one cache of the parts that the jobs of cache_teacher.py wrote: a manifest of their files, which stay where they are."""

import argparse

from kdbench import cli, files
from kdbench.teacher.parts import join


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", required=True, metavar="MANIFEST", help="manifest.json to make, in the folder that the parts lie in"
    )
    join(files.folder_of(parser.parse_args().output))


cli.run(main)
