"""What starting costs: which large packages the library, planning and each script of the workflow import."""

import json
import os
import subprocess
import sys

import pytest

from kdbench.evaluation.predictions import Prediction, write
from tests.shared import ROOT

LARGE = [
    "deepspeed",
    "nltk",
    "numpy",
    "pandas",
    "peft",
    "pydantic",
    "rapidfuzz",
    "rouge_score",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
]
OF_MODELS = {"numpy", "pydantic", "torch"}  # transformers comes with the first model or tokenizer that is loaded

# script -> what is imported before its options are read
SCRIPTS = {
    "aggregate": {"numpy"},
    "align": {"numpy", "pydantic"},
    "cache_teacher": OF_MODELS,
    "collect_scores": {"numpy"},
    "configure": set(),
    "distill": OF_MODELS,
    "download_model": OF_MODELS,
    "generate": {"pydantic"},
    "generate_answers": OF_MODELS,
    "join_cache": {"pydantic"},
    "map_vocabulary": OF_MODELS,
    "on_gpus": set(),
    "prepare_data": {"pydantic"},
    "score": set(),
    "sft": OF_MODELS,
    "spell": OF_MODELS,
    "tokenize_data": OF_MODELS,
}


def imported(program: str, *arguments, cwd=ROOT) -> set[str]:
    """The large packages that a program, in a process of its own, has imported when it ends."""
    wrapped = f"""
import json, os, runpy, sys
code = 0
try:
    {program}
except SystemExit as end:
    code = end.code or 0
if code:
    sys.exit(code)
print()
print(json.dumps(sorted(set({LARGE!r}) & sys.modules.keys())))
"""
    done = subprocess.run(
        [sys.executable, "-c", wrapped, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def of_script(name: str, *arguments, cwd=ROOT) -> set[str]:
    path = str(ROOT / f"workflow/scripts/{name}.py")
    run = f"sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')"
    return imported(run, *arguments, cwd=cwd)


@pytest.mark.parametrize("module", ["kdbench", "kdbench.cli", "kdbench.files", "kdbench.locks"])
def test_what_every_script_needs_is_the_standard_library(module):
    assert imported(f"import {module}") == set()


@pytest.mark.parametrize("module", ["settings", "config", "plan", "data.records"])
def test_settings_are_read_by_pydantic_alone(module):
    """PyTorch comes with the first method whose settings are looked at."""
    assert imported(f"import kdbench.{module}") == {"pydantic"}


def test_the_list_of_scripts_is_complete():
    assert SCRIPTS.keys() == {path.stem for path in (ROOT / "workflow/scripts").glob("*.py")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "torch" in used else ()) for name, used in SCRIPTS.items()]
)
def test_a_script_imports_no_more_than_its_work_takes(name):
    assert of_script(name, "--help") == SCRIPTS[name]


def test_light_stages_stay_light_when_they_work(tmp_path):
    """From records to a table: none of these starts PyTorch or transformers, and pandas makes tables alone."""
    assert of_script("configure", "--identity", '{"text": {}}', "--output", "config.json", cwd=tmp_path) == set()

    source = json.dumps({"source": "embedded", "split": "test", "rows": 3})
    folder = ["--source", source, "--name", "test", "--output", "test/manifest.json"]
    assert of_script("prepare_data", *folder, cwd=tmp_path) == {"pydantic"}

    answers = tmp_path / "seed1/evaluation/test/decode10/predictions.jsonl"
    write(answers, [Prediction("test/0", "q", False, "a cat", ["a cat"], 3, "eos")], {})
    scores = answers.with_name("scores.json")
    used = of_script("score", "--predictions", answers, "--output", scores, cwd=tmp_path)
    assert used == {"nltk", "numpy", "rouge_score"}
    tabular = {"numpy", "pandas"}
    made = ["--output", "scores.csv", "--items", "items.csv"]
    assert of_script("collect_scores", "--scores", scores, *made, cwd=tmp_path) == tabular
    assert of_script("aggregate", "--rows", _row("scores.csv"), "--table", "table.csv", cwd=tmp_path) == tabular
    assert (tmp_path / "table.csv").read_text().count("\n") == 2


def _row(scores: str) -> str:
    names = ("experiment", "method", "student", "teacher", "objective", "variant")
    return json.dumps([{name: name for name in names} | {"scores": scores, "items": "items.csv"}])
