"""Run a teacher once over the training records and keep its final hidden states at response positions."""

import argparse

from kdbench import cli, files, models, progress
from kdbench.data.tokens import Tokens
from kdbench.settings import CACHE_PARTS, Hardware
from kdbench.teacher import cached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the teacher")
    parser.add_argument(
        "--tokens", required=True, metavar="FOLDER", help="tokens of the training records of student and teacher"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the states on disk")
    parser.add_argument(
        "--parts",
        nargs="+",
        type=int,
        choices=range(CACHE_PARTS),
        default=list(range(CACHE_PARTS)),
        metavar="NUMBER",
        help="write these parts of the cache only, counted from 0; join_cache.py makes all of them a cache",
    )
    parser.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder of the cache")
    options = parser.parse_args()
    hardware = Hardware.model_validate_json(options.hardware)
    teacher = files.read_manifest(options.model, "model")
    tokens = Tokens.load(files.folder_of(options.tokens)).teacher
    outline = models.outline(files.folder_of(options.model), teacher.get("trust_remote_code", False))
    cached.check_space(options.output, outline, tokens, options.dtype, options.parts)
    model, tokenizer = models.for_inference(options.model, hardware)
    models.check_head(model, tokenizer)
    cached.write_parts(
        options.output,
        model,
        len(tokenizer),
        tokens,
        options.dtype,
        hardware.generation_batch_size,
        progress.over("teacher states"),
        options.parts,
        teacher_fingerprint=teacher["fingerprint"],
        tokens_fingerprint=files.read_json(files.folder_of(options.tokens) / files.MANIFEST)["fingerprint"],
    )


cli.run(main)
