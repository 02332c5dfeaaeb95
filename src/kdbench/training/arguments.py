"""The options that the training scripts share, and the job that follows from them."""

import argparse
from pathlib import Path

from kdbench import files, methods
from kdbench.data.tokens import Tokens
from kdbench.errors import UserError
from kdbench.settings import Hardware, Training
from kdbench.training.job import Job


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every training."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--config", required=True, metavar="FILE", help="config.json with the identity of the run")
    options.add_argument("--seed", type=int, help="training seed; by default the one in the config")
    options.add_argument("--model", required=True, metavar="FOLDER", help="the model to train")
    options.add_argument("--train", required=True, metavar="FOLDER", help="tokens of the training records")
    options.add_argument("--dev", required=True, metavar="FOLDER", help="tokens of the records of the dev loss")
    options.add_argument("--hardware", default="{}", metavar="JSON", help="`hardware` of the configuration")
    options.add_argument(
        "--output", required=True, metavar="MANIFEST", help="manifest.json in the `model` folder of the run to make"
    )
    return options


def job(options: argparse.Namespace, **more) -> Job:
    """The training that the options ask for; `more` adds what only distillation has.

    Raises:
        UserError: an input is missing or damaged; the file of a method is not the one that the identity is of.
    """
    identity = files.read_json(options.config)
    method = identity["method"]["name"]
    if methods.sha256(method) != identity["method"].get("sha256"):
        raise UserError(
            f"method {method}: the file has changed since {options.config} was written; run snakemake again"
        )
    manifest = files.read_manifest(options.model, "model")
    for tokens in (options.train, options.dev):
        files.read_manifest(tokens, "tokens")
    return Job(
        output=files.folder_of(options.output).parent,
        identity=identity,
        seed=identity["seed"] if options.seed is None else options.seed,
        training=Training.model_validate(identity["training"]),
        hardware=Hardware.model_validate_json(options.hardware),
        student=Path(files.folder_of(options.model)),
        train=Tokens.load(files.folder_of(options.train)),
        dev=Tokens.load(files.folder_of(options.dev)),
        method=method,
        method_settings=identity["method"]["settings"],
        trust_remote_code=manifest.get("trust_remote_code", False),
        **more,
    )
