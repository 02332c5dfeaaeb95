"""Pydantic's findings as lines for people: the key's path, the value, what was expected, the nearest valid key."""

import json
import types
import typing

from pydantic import BaseModel, ValidationError

from kdbench.errors import UserError, nearest


def validate(cls: type[BaseModel], raw, at: tuple = ()):
    """An instance of `cls` from what YAML holds; `at` is the path of `raw` in the configuration.

    Raises:
        UserError: one line for each mistake.
    """
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for mistake in error.errors():
            where, line = _line(cls, raw, mistake, at)
            lines.setdefault(where, f"config: {line}")  # a value that fits no member of a union is one mistake
        raise UserError("\n".join(lines.values())) from None


def _line(cls, raw, mistake, at) -> tuple[str, str]:
    path, value, owner = [], raw, cls
    for part in mistake["loc"]:
        if isinstance(value, dict) and (part in value or (part == mistake["loc"][-1] and mistake["type"] == "missing")):
            path.append(part)
            owner = _owner(owner, part, value.get(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part]
    where = dotted((*at, *path))
    kind = mistake["type"]
    if kind == "extra_forbidden":
        return where, f"{where}: {nearest(str(path[-1]), _keys(cls, raw, path[:-1]), 'a key here')}"
    if kind == "missing":
        return where, f"{where}: this key is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        valid = mistake.get("ctx", {}).get("expected_tags", "")
        key = "source" if kind == "union_tag_invalid" else "source is required and"
        return where, f"{where}: {key} must be one of {valid}"
    if mistake["loc"] and mistake["loc"][-1] == "[key]":
        return where, f"{where}: names consist of letters, digits, '_', '.' and '-'"
    message = mistake["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch" and isinstance(value, str) and any(letter.isspace() for letter in value):
        message = "no spaces are possible here (paths and names go through shells and wildcards)"
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return where, f"{where}: {shown if len(shown) < 80 else shown[:77] + '...'}: {message}"


def dotted(path: tuple) -> str:
    """experiments.demo.seeds[1]"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the configuration"


def _owner(annotation, key, value):
    """The annotation of a key's value, for models, dictionaries of models and tagged unions."""
    annotation = _plain(annotation, value)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(key)
        return _plain(field.annotation, value) if field else None
    if typing.get_origin(annotation) is dict:
        return _plain(typing.get_args(annotation)[1], value)
    return None


def _plain(annotation, value):
    """Without Annotated; of a union of models the one with the value's `source`, else the first model."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [_plain(member, value) for member in typing.get_args(annotation)]
        models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        source = value.get("source") if isinstance(value, dict) else None
        tagged = [model for model in models if _tag(model) == source]
        return (tagged or models or members)[0]
    return annotation


def _tag(model) -> str | None:
    field = model.model_fields.get("source")
    return typing.get_args(field.annotation)[0] if field else None


def _keys(cls, raw, path) -> list[str]:
    owner, value = cls, raw
    for part in path:
        value = value[part]
        owner = _owner(owner, part, value)
    owner = _plain(owner, value)
    return list(owner.model_fields) if isinstance(owner, type) and issubclass(owner, BaseModel) else []
