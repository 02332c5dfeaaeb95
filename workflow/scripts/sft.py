"""Fine-tune a model on responses: a teacher or a student on those of the data, or a student on those of its teacher."""

from kdbench import cli
from kdbench.training import arguments
from kdbench.training.run import train


def main():
    train(arguments.job(arguments.parser(__doc__).parse_args()))


cli.run(main)
