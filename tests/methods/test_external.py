"""Methods that are no part of kdbench: from a file, from an installed package, and the one of docs/adding_a_method.md."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from kdbench import config, files, methods
from kdbench.errors import UserError
from kdbench.methods.base import Method
from kdbench.plan import Plan
from kdbench.training import arguments
from kdbench.training.run import train
from tests.shared import ROOT
from tests.training import jobs

PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
EMBEDDED = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
NAME = "my_methods/cosine.py"


def block(language: str, number: int = 0) -> str:
    """A piece of code of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the page's method in it."""
    monkeypatch.chdir(tmp_path)
    files.write_text(tmp_path / NAME, block("python"))
    return tmp_path


def configured(changes=None):
    """The embedded experiment with the blocks of the page."""
    raw, added = copy.deepcopy(EMBEDDED), changes or yaml.safe_load(block("yaml"))
    raw["methods"] |= added["methods"]
    for name, keys in added["experiments"].items():
        raw["experiments"][name] |= keys
    return raw


def test_the_page_s_configuration_is_understood(folder):
    plan = Plan(config.load(configured()))
    variants = plan.variants["cross_tokenizer"]
    assert list(variants) == ["sft", "uld", "cosine", "cosine_strong"]
    assert variants["cosine"].method == variants["cosine_strong"].method == NAME
    assert variants["cosine"].settings == {"kd_rate": 0.3}
    assert variants["cosine"].across_tokenizers
    assert (variants["cosine"].needs.teacher, variants["cosine"].needs.alignment) == ("signal", "byte")
    identity = plan.run("cross_tokenizer", "cosine")["method"]
    assert identity == {"name": NAME, "version": 1, "settings": {"kd_rate": 0.3}, "sha256": files.sha256(NAME)}
    assert "sha256" not in plan.run("cross_tokenizer", "uld")["method"]


def test_a_changed_file_is_another_run_and_moves_no_other(folder):
    def identities():
        plan = Plan(config.load(configured()))
        return {name: plan.run("cross_tokenizer", name) for name in plan.variants["cross_tokenizer"]}

    before, first = identities(), methods.get(NAME)
    (folder / NAME).write_text(block("python").replace("version = 1", "version = 1 + 1"))
    after = identities()
    assert {name for name in before if before[name] != after[name]} == {"cosine", "cosine_strong"}
    assert methods.get(NAME) is not first
    assert (first.version, methods.get(NAME).version) == (1, 2)


def test_the_page_s_test_passes(folder):
    namespace = {}
    exec(block("python", 1), namespace)
    (test,) = (value for name, value in namespace.items() if name.startswith("test_"))
    test()


def test_a_training(folder, models_folder):
    job = jobs.make_job(folder / "run", models_folder, "uld-byte")
    job = replace(job, method=NAME, method_settings={"kd_rate": 0.3}, identity={"method": {"name": NAME}})
    train(job)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "cosine" in line]
    assert len(steps) == 6
    for line in steps:
        assert line["loss"] == pytest.approx(line["ce"] + 0.3 * line["cosine"], rel=1e-5)
    assert steps[-1]["cosine"] < steps[0]["cosine"]
    assert not any("projector" in name for name in jobs.weights(folder / "run" / "model"))


@pytest.mark.slow
def test_the_generic_tests_take_it(folder):
    """As the page says; those that are long have their own test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cosine", "tests/methods/test_families.py",
               "tests/methods/test_losses_of_methods.py"]  # fmt: skip
    environment = os.environ | {"KDBENCH_METHOD": str(folder / NAME), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


BASE = "from kdbench.methods.base import Method\n"
WRONG = {
    "no class": ("x = 1\n", ["has to define one subclass of kdbench.methods.base.Method", "defines none"]),
    "only an imported one": ("from kdbench.methods.uld import Uld\n", ["defines none"]),
    "two": (BASE + "class A(Method): ...\nclass B(Method): ...\n", ["defines A, B"]),
    "syntax": ("def f(:\n", ["cannot be imported", "invalid syntax"]),
    "import": ("import no_such_module_at_all\n", ["cannot be imported", "no_such_module_at_all"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_one_line_with_its_place(what, folder):
    content, said = WRONG[what]
    (folder / NAME).write_text(content)
    with pytest.raises(UserError) as caught:
        config.load(configured())
    lines = [line for line in str(caught.value).splitlines() if "methods.cosine.method" in line]
    assert len(lines) == 1
    assert lines[0].startswith("config: methods.cosine.method: method ")
    assert all(words in lines[0] for words in ["cosine.py", *said])


def test_the_mistakes_that_the_page_shows(folder):
    shown = [line.strip() for line in PAGE.splitlines() if line.startswith("    config: ")]
    assert len(shown) == 2
    for key, value, line in (("method", "my_methods/cosin.py", shown[0]), ("kd_rat", 0.3, shown[1])):
        raw = configured()
        raw["methods"]["cosine"][key] = value
        with pytest.raises(UserError) as caught:
            config.load(raw)
        assert str(caught.value).splitlines() == [line]


def test_it_is_held_to_one_tokenizer_like_others(folder):
    (folder / NAME).write_text(block("python").replace("across_tokenizers = True", "across_tokenizers = False"))
    with pytest.raises(UserError, match=r"methods\[2\]: cosine needs one tokenizer for student and teacher"):
        config.load(configured())


def test_a_file_that_changed_between_plan_and_training_is_refused(folder):
    identity = Plan(config.load(configured())).run("cross_tokenizer", "cosine")
    files.write_json(folder / "config.json", identity)
    (folder / NAME).write_text(block("python") + "\n# another thought\n")
    with pytest.raises(UserError, match=r"my_methods/cosine\.py: the file has changed since config\.json was written"):
        arguments.job(SimpleNamespace(config="config.json"))


# --- installed packages


def install(folder, **entries):
    """A package in a folder of the path, as pip leaves it."""
    files.write_text(folder / "my_package" / "__init__.py", "")
    files.write_text(folder / "my_package" / "cosine.py", block("python"))
    described = folder / "my_package-1.0.dist-info"
    files.write_text(described / "METADATA", "Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    files.write_text(described / "entry_points.txt", "\n".join([f"[{methods.GROUP}]", *lines, ""]))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package with these entry points."""
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda **entries: install(tmp_path, **entries)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_an_installed_package_offers_a_method_by_name(package, tmp_path):
    assert '[project.entry-points."kdbench.methods"]\ncosine = "my_package.cosine:Cosine"' in block("toml")
    package(cosine="my_package.cosine:Cosine")
    assert "cosine" in methods.names()
    assert "cosine" not in methods.own()
    assert issubclass(methods.get("cosine"), Method)
    raw = configured({"methods": {"cosine": {}}, "experiments": {"cross_tokenizer": {"methods": ["cosine"]}}})
    identity = Plan(config.load(raw)).run("cross_tokenizer", "cosine")["method"]
    assert identity["sha256"] == files.sha256(tmp_path / "my_package" / "cosine.py")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        methods.get("cosin")


@pytest.mark.parametrize(
    ("entries", "asked", "said"),
    [
        ({"dskd": "my_package.cosine:Cosine"}, "x", "package my-package gives one of this name, and so does kdbench"),
        ({"cosine": "my_package.nothing:Cosine"}, "cosine", "package my-package: it cannot be imported"),
        ({"cosine": "my_package.cosine:Nothing"}, "cosine", "package my-package: it cannot be imported"),
        ({"cosine": "my_package.cosine:CosineSettings"}, "cosine", "is no subclass of kdbench.methods.base.Method"),
    ],
)
def test_a_wrong_entry_point_is_one_line(package, entries, asked, said):
    package(**entries)
    with pytest.raises(UserError, match=said) as caught:
        methods.get(asked)
    assert "\n" not in str(caught.value)
