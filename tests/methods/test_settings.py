"""The registry, the settings of methods, and what methods ask of the workflow."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from kdbench import methods
from kdbench.errors import UserError
from kdbench.methods.base import Method, Needs, Shape
from kdbench.signals import Head, Signal, Step
from tests.methods.cases import build, random_signals

every = pytest.mark.parametrize("name", methods.names())


def test_the_registry_knows_every_method():
    assert {"sft", "seqkd", "vanilla_kd", "dskd", "uld"} <= set(methods.names())
    with pytest.raises(UserError, match="did you mean 'vanilla_kd'"):
        methods.get("vanila_kd")


@every
def test_settings_have_defaults_and_descriptions(name):
    kind = methods.get(name)
    assert issubclass(kind, Method)
    assert kind.version >= 1
    assert kind.Settings() is not None
    assert all(field.description for field in kind.Settings.model_fields.values())
    assert kind.Settings(**kind.Settings().model_dump()) == kind.Settings()


@every
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(ValidationError, match="temprature"):
        methods.get(name).Settings(temprature=1.0)


def test_needs():
    def needs(name, **settings):
        kind = methods.get(name)
        return kind.needs(kind.Settings(**settings))

    assert needs("sft") == Needs()
    assert needs("seqkd") == Needs(teacher="answers")
    assert needs("vanilla_kd") == needs("dskd") == Needs(teacher="signal")
    assert needs("uld") == Needs(teacher="signal", alignment="index")
    assert needs("uld", alignment="byte") == Needs(teacher="signal", alignment="byte")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vanilla_kd", {"objective": "kl"}, "forward_kl"),
        ("vanilla_kd", {"temperature": 0.0}, "greater than 0"),
        ("vanilla_kd", {"temperature": "2"}, "valid number"),
        ("vanilla_kd", {"ce_rate": -0.1}, "greater than or equal to 0"),
        ("vanilla_kd", {"skew_lambda": 0.2}, "only skewed_forward_kl and skewed_reverse_kl read it"),
        ("dskd", {"objective": "skewed_forward_kl", "adaptive_alpha": 0.3}, "only adaptive_kl read it"),
        ("dskd", {"objective": "skewed_forward_kl", "skew_lambda": 1.0}, "less than 1"),
        ("vanilla_kd", {"squared_temperature": 1}, "boolean"),
        ("uld", {"alignment": "dtw"}, "'index' or 'byte'"),
        ("seqkd", {"seed": 3}, "greedy"),
        ("seqkd", {"max_new_tokens": 0}, "greater than or equal to 1"),
        ("seqkd", {"max_new_tokens": True}, "valid integer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, said):
    with pytest.raises(ValidationError, match=said):
        methods.get(name).Settings(**settings)


def test_numbers_as_yaml_reads_them():
    settings = methods.get("vanilla_kd").Settings(objective="skewed_forward_kl", skew_lambda="1e-1", temperature=1)
    assert (settings.skew_lambda, settings.temperature) == (0.1, 1.0)


def test_squared_temperature_multiplies_the_divergence_alone():
    student, teacher = random_signals("vanilla_kd")
    kind = methods.get("vanilla_kd")
    plain, squared = (
        kind(kind.Settings(temperature=3.0, squared_temperature=on), None, None)(student, teacher, Step()).sums
        for on in (False, True)
    )
    torch.testing.assert_close(squared["kd"], 9 * plain["kd"])
    assert squared["ce"] == plain["ce"]


@pytest.mark.parametrize("name", ["vanilla_kd", "dskd"])
@pytest.mark.parametrize("what", ["size", "counts", "targets"])
def test_another_tokenizer_is_an_error_that_names_what_works(name, what):
    student, teacher = random_signals(name)
    rows, head = teacher.rows, teacher.head
    if what == "size":
        head = Head(head.weight, head.size + 1)
    elif what == "counts":
        rows = replace(rows, counts=torch.tensor([5, 4]))
    else:
        rows = replace(rows, targets=(rows.targets + 1) % 23)
    method = build(name, Shape(5, 5, 23), Shape(6, 6, 23))
    with pytest.raises(UserError, match=f"method {name} needs one tokenizer.*across tokenizers work: .*uld"):
        method(student, Signal(rows, head, None), Step())
