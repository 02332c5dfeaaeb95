"""Relate the vocabularies of student and teacher: the student's nearest token for each of the teacher's, and the tokens both have."""

import argparse

from kdbench import cli, files, models
from kdbench.alignment import vocabulary


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", required=True, nargs=2, help="folders of the student and of the teacher")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    for folder in options.models:
        files.read_manifest(folder, "model")
    student, teacher = (
        vocabulary.texts_of(models.load_tokenizer(files.folder_of(folder))) for folder in options.models
    )
    made = vocabulary.relate(student, teacher)
    same = int((made.distance == 0).sum())
    vocabulary.save(
        files.folder_of(options.output),
        made,
        tokenizers={"student": student.fingerprint, "teacher": teacher.fingerprint},
        quality={"shared": len(made.shared), "same_text": same},
    )
    print(
        f"{files.folder_of(options.output)}: {len(made.shared):,} of the student's {len(student.texts):,} tokens are the teacher's too; "
        f"{same:,} of the teacher's {len(teacher.texts):,} have one of the same text"
    )


cli.run(main)
