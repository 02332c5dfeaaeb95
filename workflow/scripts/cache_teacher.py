"""Run a teacher once over the training records and keep its final hidden states at response positions."""

import argparse

from kdbench import cli, files, models, progress
from kdbench.data.tokens import Tokens
from kdbench.settings import Hardware
from kdbench.teacher import cached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the teacher")
    parser.add_argument(
        "--tokens", required=True, metavar="FOLDER", help="tokens of the training records of student and teacher"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the states on disk")
    parser.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="manifest.json of the folder to make")
    options = parser.parse_args()
    hardware = Hardware.model_validate_json(options.hardware)
    model, tokenizer = models.for_inference(options.model, hardware)
    models.check_head(model, tokenizer)
    cached.write(
        files.folder_of(options.output),
        model,
        len(tokenizer),
        Tokens.load(files.folder_of(options.tokens)).teacher,
        options.dtype,
        hardware.generation_batch_size,
        progress.over("teacher states"),
        teacher_fingerprint=files.read_manifest(options.model, "model")["fingerprint"],
        tokens_fingerprint=files.read_manifest(options.tokens, "tokens")["fingerprint"],
    )


cli.run(main)
