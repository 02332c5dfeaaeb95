"""Write config/README.md from the settings classes: `python -m kdbench.reference > config/README.md` (or `make docs`)."""

import json
import types
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdbench import methods, settings

_INTRODUCTION = """# Configuration

<!-- Written by `make docs` from src/kdbench/settings.py and the methods' settings: change it there. -->

`config.yaml` is the embedded experiment. Your own is one more file of the same form:

    snakemake --cores 8 results/table.csv --configfile my.yaml --replace-workflow-config

`--replace-workflow-config` leaves config.yaml out; without it the two are united, key by key. All mistakes are reported together, before
any work, one line each:

    config: experiments.mine.methods[1]: 'vanila_kd' is not one of `methods`; did you mean 'vanilla_kd'? valid: dskd, sft, ...

Names (of models, data sets, teachers, methods, experiments) are yours; they consist of letters, digits, `_`, `.` and `-`, and become
folder names. Paths start from the folder of the Snakefile. What a change reruns follows from what it concerns: a method's settings rerun
that method, the teacher's training reruns the teacher and what learns from it, `hardware` reruns nothing.
"""

_BLOCKS = """## Methods

Each block of `methods` is named after a method, or names it by `method:`, so that one method can run with several settings:

    methods:
      vanilla_kd: {objective: [forward_kl, reverse_kl]}         # a list of objectives: one variant each, vanilla_kd.forward_kl, ...
      vanilla_kd_hot: {method: vanilla_kd, temperature: 4.0}    # another name for the same method
      dskd: {training: {learning_rate: 1.0e-4}}                 # differences to the general `training`
      mine: {method: my_methods/cosine.py, kd_rate: 0.3}        # a method of your own: a Python file, see docs/adding_a_method.md

Methods of installed packages (entry points of the group `kdbench.methods`) go by their names, like those below.
"""


def main() -> None:
    """Print the page."""
    parts = [_INTRODUCTION, _table("The whole", settings.Config)]
    for name, cls in _SECTIONS.items():
        parts.append(_table(name, cls))
    parts.append(_BLOCKS)
    for name in methods.own():
        parts.append(_table(f"`{name}`", methods.get(name).Settings, level=3))
    print("\n".join(parts).rstrip())


_SECTIONS = {
    "`models.<name>` with `source: init`": settings.InitModel,
    "`models.<name>.tokenizer`, to train one": settings.TrainedTokenizer,
    "`models.<name>` with `source: path`": settings.PathModel,
    "`models.<name>` with `source: hub`": settings.HubModel,
    "`datasets.<name>` with `source: embedded`": settings.EmbeddedData,
    "`datasets.<name>` with `source: file`": settings.FileData,
    "`text`": settings.Text,
    "`training`": settings.Training,
    "`training.lora`": settings.Lora,
    "`teachers.<name>`": settings.Teacher,
    "`experiments.<name>`": settings.Experiment,
    "`evaluation`": settings.Evaluation,
    "`hardware`": settings.Hardware,
}


def _table(title: str, cls: type[BaseModel], level: int = 2) -> str:
    about = (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
    lines = [f"{'#' * level} {title}", "", about, ""]
    if not cls.model_fields:
        return "\n".join(lines)
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in cls.model_fields.items():
        lines.append(
            f"| `{name}` | {_values(field)} | {_default(field)} | {field.description or ''} |".replace("  ", " ")
        )
    return "\n".join([*lines, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, BaseModel):
        return "below"
    return f"`{json.dumps(field.default)}`"


def _values(field: FieldInfo) -> str:
    return _kind(field.annotation)


def _kind(annotation) -> str:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(members[0])
    if origin is typing.Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(member) for member in members if member is not type(None)))
    if origin is list:
        return f"list of {_kind(members[0])}"
    if origin is dict:
        return "keys" if members[1] is typing.Any else f"names, each {_kind(members[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}.get(annotation, "any")


if __name__ == "__main__":
    main()
