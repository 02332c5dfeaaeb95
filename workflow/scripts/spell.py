"""Compare how the tokens of student and teacher are spelled: edit distances at response positions, and the warping path through them."""

import argparse

from kdbench import cli, files, models
from kdbench.alignment.spelling import spell
from kdbench.alignment.vocabulary import texts_of
from kdbench.data.tokens import Tokens
from kdbench.errors import UserError


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", required=True, help="folder of tokens of both models")
    parser.add_argument("--models", required=True, nargs=2, help="folders of the student and of the teacher")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    source = files.read_manifest(options.tokens, "tokens")
    for folder in options.models:
        files.read_manifest(folder, "model")
    tokens = Tokens.load(files.folder_of(options.tokens))
    student, teacher = (texts_of(models.load_tokenizer(files.folder_of(folder))) for folder in options.models)
    if {"student": student.fingerprint, "teacher": teacher.fingerprint} != source.get("tokenizers"):
        raise UserError(f"{options.tokens} is of other tokenizers than those of {' and '.join(options.models)}")
    made = spell(tokens, student.texts, teacher.texts)
    made.save(files.folder_of(options.output), tokens=source["fingerprint"])
    share = len(made.pairs.student) / len(made.student_lengths)
    print(
        f"{files.folder_of(options.output)}: warping pairs {share:.1%} of the student's response positions with exactly one of the teacher"
    )


cli.run(main)
