"""Reading a configuration: everything that can be wrong with it is found here, before any work, one line for each mistake."""

import contextlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from kdbench import methods
from kdbench.errors import UserError, nearest
from kdbench.mistakes import validate
from kdbench.settings import Config, FileData, HubModel, InitModel, PathModel, Training
from kdbench.vocabularies import architecture, same_tokenizer, vocabulary_size

RESERVED = {"teachers", "tokens", "alignments", "benchmarks"}  # folders of results/ beside the experiments
COLUMNS = re.compile(  # of the table, beside one for each data set
    r"experiment|method|student|teacher|objective|variant|average|training_seeds|decode_seeds|std_over|interval_over"
    r"|.*_(std|low|high)"
)
_METHOD_KEYS = {"method", "training"}  # keys of a method's block that are not settings of the method


def load(raw: dict) -> Config:
    """Typed settings from what YAML holds.

    Raises:
        UserError: one line for each mistake, with the key's path, the value and what was expected.
    """
    if not isinstance(raw, dict):
        raise UserError("config: expected keys such as `models` and `experiments`")
    config = validate(Config, raw)
    problems = [f"config: {problem}" for check in _CHECKS for problem in check(config)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def merged_training(config: Config, *differences: dict, at: tuple = ()) -> Training:
    """The top-level `training` with the differences of an experiment, a teacher or a method, LoRA's defaults filled in.

    Raises:
        UserError: one line for each mistake; `at` is the path of the differences.
    """
    keys = config.training.model_dump(exclude_none=True)
    for difference in differences:
        keys |= difference
    if keys.get("tuning") == "lora":
        keys.setdefault("lora", {})
    elif keys.get("tuning", "full") == "full" and any(difference.get("tuning") == "full" for difference in differences):
        keys.pop(
            "lora", None
        )  # an experiment that goes back to full training has no use for the adapters of the general settings
    return validate(Training, keys, at)


@cache
def gpus_here() -> int:
    """GPUs of this machine; asked once, for Snakemake wants to know it of every job."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def check_gpus(config: Config, here: int) -> None:
    """Refuse more GPUs than a single machine has; on a cluster its scheduler knows better.

    Raises:
        UserError: fewer than `hardware.gpus`.
    """
    asked = config.hardware.gpus
    if asked != "auto" and asked > here:
        raise UserError(
            f"config: hardware.gpus: {asked} asked for, but this machine has {here}; write `auto` or at most {here}"
        )


# --- checks across keys: each yields lines ----------------------------------------------------------------------------------------


def _references(config: Config):
    known = {
        "models": config.models,
        "datasets": config.datasets,
        "teachers": config.teachers,
        "methods": config.methods,
    }
    for name, teacher in config.teachers.items():
        yield from _missing(known, f"teachers.{name}", "models", model=teacher.model)
        yield from _missing(known, f"teachers.{name}", "datasets", train=teacher.train, dev=teacher.dev)
        if teacher.train and not teacher.dev:
            yield f"teachers.{name}.dev: required where `train` is given: the data set of the dev loss"
        if teacher.dev and not teacher.train:
            yield f"teachers.{name}.train: required where `dev` is given"
        if teacher.training and not teacher.train:
            yield f"teachers.{name}.training: has no effect without `train`; give `train` and `dev`, or take it out"
    for name, experiment in config.experiments.items():
        if name in RESERVED:
            yield f"experiments.{name}: this name is that of a folder of results/; choose another"
        at = f"experiments.{name}"
        yield from _missing(known, at, "teachers", teacher=experiment.teacher)
        yield from _missing(known, at, "models", student=experiment.student)
        yield from _missing(known, at, "datasets", train=experiment.train, dev=experiment.dev)
        for index, method in enumerate(experiment.methods):
            yield from _missing(known, at, "methods", **{f"methods[{index}]": method})
    for index, dataset in enumerate(config.evaluation.datasets):
        yield from _missing(known, "evaluation", "datasets", **{f"datasets[{index}]": dataset})
        if COLUMNS.fullmatch(dataset):
            yield f"evaluation.datasets[{index}]: the table has another column named {dataset}; give the data set another name"
    for name, model in config.models.items():
        if isinstance(model, InitModel) and not isinstance(model.tokenizer, str):
            yield from _missing(known, f"models.{name}.tokenizer", "datasets", train_on=model.tokenizer.train_on)
        if isinstance(model, HubModel):
            yield from _missing(known, f"models.{name}", "models", shares_tokenizer_with=model.shares_tokenizer_with)


def _missing(known: dict, at: str, kind: str, **keys):
    for key, name in keys.items():
        if name is not None and name not in known[kind]:
            yield f"{at}.{key}: {nearest(name, known[kind], f'one of `{kind}`')}"


def _trainings(config: Config):
    blocks = [(f"teachers.{name}", teacher.training) for name, teacher in config.teachers.items()]
    blocks += [(f"experiments.{name}", experiment.training) for name, experiment in config.experiments.items()]
    blocks += [(f"methods.{name}", (block or {}).get("training", {})) for name, block in config.methods.items()]
    for at, difference in blocks:
        if not isinstance(difference, dict):
            yield f"{at}.training: {difference!r}: expected keys of `training`"
            continue
        try:
            merged_training(config, difference, at=(at, "training"))
        except UserError as error:
            yield from _lines(error)


def _lines(error: UserError):
    return (line.removeprefix("config: ") for line in str(error).splitlines())


def _methods(config: Config):
    for name, block in config.methods.items():
        block = dict(block or {})
        method = block.get("method", name)
        at = f"methods.{name}" + (".method" if "method" in block else "")
        try:
            cls = methods.get(str(method))
        except UserError as error:
            yield f"{at}: {error}" + ("" if "method" in block else " (give another name's method by `method:`)")
            continue
        for objective in objectives(block):
            keys = {key: value for key, value in block.items() if key not in _METHOD_KEYS}
            if objective is not None:
                keys["objective"] = objective
            try:
                validate(cls.Settings, keys, ("methods", name))
            except UserError as error:
                yield from _lines(error)


def _known(config: Config):
    """The blocks whose methods there are, with these."""
    for name, block in config.methods.items():
        with contextlib.suppress(UserError):  # `_methods` tells of those that are not
            yield name, methods.get(str((block or {}).get("method", name)))


def objectives(block: dict) -> list:
    """The objectives of a method's block; one None where it does not list several."""
    listed = block.get("objective")
    return listed if isinstance(listed, list) and listed else [None]


def _objectives_distinct(config: Config):
    for name, block in config.methods.items():
        listed = (block or {}).get("objective")
        if isinstance(listed, list) and (not listed or len(set(map(str, listed))) < len(listed)):
            yield f"methods.{name}.objective: {listed}: list each objective once, at least one"


def _files(config: Config):
    for name, data in config.datasets.items():
        if isinstance(data, FileData):
            yield from _unreadable(f"datasets.{name}.path", data.path)
    for name, model in config.models.items():
        if isinstance(model, PathModel):
            yield from _no_folder(f"models.{name}.path", model.path, ["config.json"])
        if isinstance(model, InitModel) and isinstance(model.tokenizer, str):
            yield from _no_folder(f"models.{name}.tokenizer", model.tokenizer, [])
        if isinstance(model, InitModel) and isinstance(model.architecture, str):
            yield from _unreadable(f"models.{name}.architecture", model.architecture)


def _unreadable(at: str, path: str):
    if not Path(path).is_file():
        yield f"{at}: {path}: there is no such file (paths start from the folder of the Snakefile)"
    elif Path(path).stat().st_size == 0:
        yield f"{at}: {path}: the file is empty"


def _no_folder(at: str, path: str, wanted: list[str]):
    if not Path(path).is_dir():
        yield f"{at}: {path}: there is no such folder (paths start from the folder of the Snakefile)"
    for name in wanted:
        if Path(path).is_dir() and not (Path(path) / name).is_file():
            yield f"{at}: {path}: {name} is missing in it"


def _lengths(config: Config):
    text = config.text
    if text.max_prompt_tokens >= text.max_tokens:
        yield f"text: max_prompt_tokens {text.max_prompt_tokens} leaves no room for a response in max_tokens {text.max_tokens}"


def _vocabularies(config: Config):
    for name, model in config.models.items():
        keys = architecture(model)
        if keys is None:
            continue
        if isinstance(model, InitModel) and "model_type" not in keys:
            yield f"models.{name}.architecture: `model_type` is required, such as gpt2 or qwen2"
        size, tokens = keys.get("vocab_size"), vocabulary_size(model)
        if isinstance(size, int) and tokens and size < tokens:
            yield f"models.{name}: vocab_size {size} does not fit its tokenizer, which has {tokens} tokens"
        positions = keys.get("max_position_embeddings") or keys.get("n_positions")
        text, answer = config.text, config.evaluation.max_new_tokens
        if not isinstance(positions, int):
            continue
        if positions < text.max_tokens:
            yield f"models.{name}: the model has {positions} positions, text.max_tokens is {text.max_tokens}; lower the latter"
        elif positions < text.max_prompt_tokens + answer:
            yield (
                f"models.{name}: the model has {positions} positions, text.max_prompt_tokens and evaluation.max_new_tokens make"
                f" {text.max_prompt_tokens + answer}; lower one of them"
            )


def _tokenizers(config: Config):
    known = dict(_known(config))
    for name, experiment in config.experiments.items():
        teacher = config.teachers.get(experiment.teacher)
        if teacher is None or not {teacher.model, experiment.student} <= config.models.keys():
            continue
        if same_tokenizer(config, experiment.student, teacher.model) is not False:
            continue
        for index, key in enumerate(experiment.methods):
            if key in known and not known[key].across_tokenizers:
                works = [other for other in methods.names() if methods.get(other).across_tokenizers]
                yield (
                    f"experiments.{name}.methods[{index}]: {key} needs one tokenizer for student and teacher, but {experiment.student} and"
                    f" {teacher.model} have different ones; methods that work for this pair: {', '.join(works)}"
                )


_CHECKS = (_references, _trainings, _objectives_distinct, _methods, _files, _lengths, _vocabularies, _tokenizers)
