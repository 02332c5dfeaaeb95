"""Scripts by hand: what `--help` says, and how a mistake is told, by a script and by Snakemake."""

import json
import os
import re
import subprocess
import sys

import pytest

from kdbench import models
from kdbench.data import records, world
from kdbench.settings import TrainedTokenizer
from tests.shared import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "workflow/scripts").glob("*.py"))

ROW = {"experiment": "e", "method": "sft", "student": "s", "teacher": "t", "objective": "", "variant": "sft"}
ANSWER = ["--settings", '{"decoding": {}, "text": {}}']
TRAIN = [
    "--config",
    "nowhere/config.json",
    "--seed",
    "1",
    "--model",
    "nowhere",
    "--train",
    "nowhere",
    "--dev",
    "nowhere",
]
TO_FOLDER = ["--output", "made/manifest.json"]
TO_FILE = ["--output", "made.json"]

# script -> arguments that name an input that is not there (all of them but configure.py read files)
NOTHING_THERE = {
    "aggregate.py": [
        "--rows",
        json.dumps([ROW | {"scores": "nowhere/scores.csv", "items": "nowhere/items.csv"}]),
        "--table",
        "made.csv",
    ],
    "align.py": ["--tokens", "nowhere", *TO_FOLDER],
    "cache_teacher.py": ["--model", "nowhere", "--tokens", "nowhere", "--output", "made"],
    "collect_scores.py": ["--scores", "nowhere/evaluation/test/decode10/scores.json", *TO_FILE, "--items", "items.csv"],
    "distill.py": [*TRAIN, "--teacher", "nowhere", *TO_FOLDER],
    "download_model.py": ["--source", '{"source": "path", "path": "nowhere"}', *TO_FOLDER],
    "generate.py": ["--model", "nowhere", "--records", "nowhere", *ANSWER, *TO_FILE],
    "generate_answers.py": [
        "--config",
        "nowhere/config.json",
        "--model",
        "nowhere",
        "--records",
        "nowhere",
        *TO_FOLDER,
    ],
    "join_cache.py": ["--output", "nowhere/manifest.json"],
    "map_vocabulary.py": ["--models", "nowhere", "nowhere", *TO_FOLDER],
    "on_gpus.py": ["99", "--", "true"],
    "prepare_data.py": ["--source", '{"source": "file", "path": "nowhere.jsonl"}', "--name", "mine", *TO_FOLDER],
    "score.py": ["--predictions", "nowhere.jsonl", *TO_FILE],
    "sft.py": [*TRAIN, *TO_FOLDER],
    "spell.py": ["--tokens", "nowhere", "--models", "nowhere", "nowhere", *TO_FOLDER],
    "tokenize_data.py": ["--records", "nowhere", "--models", "nowhere", "--text", "{}", *TO_FOLDER],
}


def call(folder, script, *arguments):
    command = [sys.executable, str(ROOT / "workflow/scripts" / script), *arguments]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def described(page: str) -> dict[str, str]:
    """Every argument of a help page and what is said of it."""
    found = {}
    for section in re.split(r"\n(?=(?:positional arguments|options):\n)", page)[1:]:
        for entry in re.split(r"\n  (?=\S)", section.split("\n\n")[0])[1:]:
            name, _, text = re.sub(r"\n +|\s{2,}", "\0", entry, count=1).partition("\0")
            found[name] = " ".join(text.split())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(tmp_path, script):
    result = call(tmp_path, script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    usage, says, *_ = result.stdout.split("\n\n")
    assert len(says.split()) >= 5, says
    arguments = described(result.stdout)
    assert set(re.findall(r"--[a-z][a-z-]*", usage)) <= {name.split()[0] for name in arguments}
    assert all(arguments.values()), arguments
    assert len(arguments) > 1  # beside --help
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTHING_THERE)
def test_input_that_is_not_there(tmp_path, script):
    result = call(tmp_path, script, *NOTHING_THERE[script])
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert "nowhere" in result.stderr or script == "on_gpus.py"
    assert result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"made.part"}
    assert not list(tmp_path.glob("made.part/*"))


def test_every_script_that_reads_files_is_tested():
    assert set(SCRIPTS) - NOTHING_THERE.keys() == {"configure.py"}


@pytest.mark.slow
def test_texts_longer_than_the_model(tmp_path):
    """By hand, from data to training: what no configuration shows beforehand is told in one line, too."""
    architecture = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    tokenizer = {"train_on": "data", "vocabulary_size": 300}
    model = {"source": "init", "architecture": architecture, "tokenizer": tokenizer}
    data = {"source": "embedded", "split": "train", "rows": 8}
    (tmp_path / "config.json").write_text('{"method": {"name": "sft", "settings": {}}, "training": {}}')
    for script, *arguments in (
        ["prepare_data.py", "--source", json.dumps(data), "--name", "data", "--output", "data/manifest.json"],
        ["download_model.py", "--source", json.dumps(model), "--text", "data", "--output", "model/manifest.json"],
        [
            "tokenize_data.py",
            "--records",
            "data",
            "--models",
            "model",
            "--text",
            "{}",
            "--output",
            "tokens/manifest.json",
        ],
    ):
        result = call(tmp_path, script, *arguments)
        assert result.returncode == 0, result.stderr
    training = ["--seed", "1", "--model", "model", "--train", "tokens", "--dev", "tokens", *TO_FOLDER]
    result = call(tmp_path, "sft.py", "--config", "config.json", "--hardware", '{"gpus": 0}', *training)
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert re.match(r"error: the model has 64 positions, the longest record \d+ tokens: lower text.max_tokens", told[0])
    assert "Traceback" not in result.stderr


def unknown_method(workflow):
    workflow.change("experiments", "same", "methods", ["sft", "vanila_kd"])


def missing_data(workflow):
    workflow.change("datasets", "test", {"source": "file", "path": "nowhere.jsonl"})


def wrong_method_for_the_pair(workflow):
    workflow.change("experiments", "cross", "methods", ["sft", "vanilla_kd"])


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (unknown_method, r"experiments\.same\.methods\[1\]: 'vanila_kd' .*did you mean 'vanilla_kd'\? valid: .*"),
        (missing_data, r"datasets\.test\.path: nowhere\.jsonl: there is no such file .*"),
        (wrong_method_for_the_pair, r"experiments\.cross\.methods\[1\]: vanilla_kd needs one tokenizer .*"),
    ],
)
def test_configuration_is_refused(untouched, mistake, line):
    mistake(untouched)
    code, output = untouched.run("--dry-run")
    assert code != 0
    assert "Traceback" not in output, output
    told = [text for text in output.splitlines() if text.startswith("config: ")]
    assert len(told) == 1, output
    assert re.fullmatch(f"config: {line}", told[0])
    assert not (untouched.folder / "results").exists()


def test_pair_without_a_common_tokenizer_fails_before_any_training(tmp_path):
    """What the configuration cannot know of models on the hub is found as soon as they are there."""
    drawn = world.records("dev", 12)
    records.write(tmp_path / "records", drawn)
    for name, size in (("student", 280), ("teacher", 300)):
        texts = (text for record in drawn for text in (record.instruction, *record.outputs))
        settings = TrainedTokenizer(train_on="dev", vocabulary_size=size)
        models.train_tokenizer(texts, settings).save_pretrained(tmp_path / name)
    options = ["--records", tmp_path / "records", "--models", tmp_path / "student", tmp_path / "teacher"]
    options += [
        "--text",
        '{"max_prompt_tokens": 300, "max_tokens": 600}',
        "--output",
        tmp_path / "tokens/manifest.json",
    ]
    refused = call(tmp_path, "tokenize_data.py", *map(str, options), "--one-tokenizer", "dskd")
    assert refused.returncode == 2
    assert "have different tokenizers; dskd cannot work for this pair" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "tokens").exists()
    assert call(tmp_path, "tokenize_data.py", *map(str, options)).returncode == 0
