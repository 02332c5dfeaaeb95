"""Bad configurations are refused with one clear line each; good ones are understood."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from kdbench import config, reference
from kdbench.errors import UserError
from kdbench.files import canonical
from kdbench.plan import Plan

ROOT = Path(__file__).parent.parent
EMBEDDED = yaml.safe_load((ROOT / "config/config.yaml").read_text())


@pytest.fixture
def good():
    return copy.deepcopy(EMBEDDED)


def at(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


def put(*path_and_value):
    """A change: set the value at a path."""
    *path, value = path_and_value

    def change(tree, tmp_path):
        parent, key = at(tree, path)
        parent[key] = value

    return change


def drop(*path):
    def change(tree, tmp_path):
        parent, key = at(tree, path)
        del parent[key]

    return change


def data_file(content):
    def change(tree, tmp_path):
        file = tmp_path / "rows.jsonl"
        file.write_text(content)
        tree["datasets"]["mine"] = {"source": "file", "path": str(file)}

    return change


def evaluated(name):
    def change(tree, tmp_path):
        tree["datasets"][name] = tree["datasets"]["test"]
        tree["evaluation"]["datasets"] = ["test", name]

    return change


def model_folder(config_json, tokenizer_json):
    def change(tree, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(config_json))
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
        tree["models"]["mine"] = {"source": "path", "path": str(tmp_path)}

    return change


TINY = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 3, "content": "<end>"}]}

# what is wrong -> (change, words that the line must contain, the key's path first)
BAD = {
    "unknown key at the top": (put("experimnts", {}), ["experimnts:", "did you mean 'experiments'"]),
    "unknown key inside": (
        put("training", "learning_rat", 1e-3),
        ["training.learning_rat:", "did you mean 'learning_rate'"],
    ),
    "unknown key of an experiment": (
        put("experiments", "same_tokenizer", "seed", 1),
        ["experiments.same_tokenizer.seed:", "did you mean 'seeds'"],
    ),
    "missing key": (
        drop("experiments", "same_tokenizer", "teacher"),
        ["experiments.same_tokenizer.teacher:", "required"],
    ),
    "missing section": (drop("evaluation"), ["evaluation:", "required"]),
    "text for a number": (put("training", "epochs", "many"), ["training.epochs:", '"many"', "integer"]),
    "fraction for a whole number": (put("training", "batch_size", 2.5), ["training.batch_size:", "2.5", "integer"]),
    "yes for a number": (put("training", "batch_size", True), ["training.batch_size:", "true", "integer"]),
    "number for yes or no": (put("evaluation", "stemmer", 1), ["evaluation.stemmer:", "boolean"]),
    "negative rate": (put("training", "learning_rate", -1.0), ["training.learning_rate:", "-1.0", "greater than 0"]),
    "rate of nan": (put("training", "learning_rate", float("nan")), ["training.learning_rate:", "finite"]),
    "unknown schedule": (put("training", "schedule", "cosin"), ["training.schedule:", '"cosin"', "'cosine'"]),
    "adapters without LoRA": (put("training", "lora", {"rank": 8}), ["training", "tuning: lora"]),
    "unknown method": (
        put("experiments", "same_tokenizer", "methods", ["sft", "vanila_kd"]),
        ["experiments.same_tokenizer.methods[1]:", "did you mean 'vanilla_kd'"],
    ),
    "block of an unknown method": (put("methods", "dskdd", {}), ["methods.dskdd:", "did you mean 'dskd'"]),
    "method key naming none": (
        put("methods", "mine", {"method": "udl"}),
        ["methods.mine.method:", "did you mean 'uld'"],
    ),
    "unknown setting of a method": (
        put("methods", "uld", {"alignmnt": "byte"}),
        ["methods.uld.alignmnt:", "did you mean 'alignment'"],
    ),
    "unknown objective": (
        put("methods", "vanilla_kd", {"objective": "forward"}),
        ["methods.vanilla_kd.objective:", '"forward"', "forward_kl"],
    ),
    "unknown objective in a list": (
        put("methods", "vanilla_kd", {"objective": ["forward_kl", "kl"]}),
        ["methods.vanilla_kd.objective:", '"kl"'],
    ),
    "objective listed twice": (
        put("methods", "vanilla_kd", {"objective": ["forward_kl", "forward_kl"]}),
        ["methods.vanilla_kd.objective:", "once"],
    ),
    "unknown alignment": (put("methods", "uld", {"alignment": "word"}), ["methods.uld.alignment:", '"word"', "'byte'"]),
    "same-tokenizer method across tokenizers": (
        put("experiments", "cross_tokenizer", "methods", ["sft", "dskd"]),
        ["experiments.cross_tokenizer.methods[1]:", "one tokenizer", "uld"],
    ),
    "unknown teacher": (
        put("experiments", "same_tokenizer", "teacher", "kelmor"),
        ["experiments.same_tokenizer.teacher:", "did you mean 'kelmor_teacher'"],
    ),
    "unknown student": (
        put("experiments", "same_tokenizer", "student", "gpt"),
        ["experiments.same_tokenizer.student:", "small_gpt2"],
    ),
    "unknown data set": (
        put("evaluation", "datasets", ["test", "tests"]),
        ["evaluation.datasets[1]:", "did you mean 'test'"],
    ),
    "data set to evaluate listed twice": (
        put("evaluation", "datasets", ["test", "test"]),
        ["evaluation.datasets:", "more than once: test"],
    ),
    "data set named as a column of the table": (
        evaluated("average"),
        ["evaluation.datasets[1]:", "another column named average"],
    ),
    "missing data file": (
        put("datasets", "mine", {"source": "file", "path": "nowhere.jsonl"}),
        ["datasets.mine.path:", "no such file"],
    ),
    "empty data file": (data_file(""), ["datasets.mine.path:", "empty"]),
    "path with a space": (
        put("datasets", "mine", {"source": "file", "path": "my data.jsonl"}),
        ["datasets.mine.path:", "my data.jsonl", "space"],
    ),
    "unknown source": (put("datasets", "mine", {"source": "web"}), ["datasets.mine:", "source", "embedded", "file"]),
    "no source": (put("models", "mine", {"path": "x"}), ["models.mine:", "source"]),
    "missing model folder": (
        put("models", "mine", {"source": "path", "path": "nowhere"}),
        ["models.mine.path:", "no such folder"],
    ),
    "vocabulary smaller than the tokenizer": (
        put("models", "small_gpt2", "architecture", "vocab_size", 600),
        ["models.small_gpt2:", "vocab_size 600", "700"],
    ),
    "vocabulary smaller than the tokenizer on disk": (
        model_folder({"model_type": "gpt2", "vocab_size": 3, "n_positions": 512}, TINY),
        ["models.mine:", "vocab_size 3", "4 tokens"],
    ),
    "too few positions": (
        put("models", "small_gpt2", "architecture", "n_positions", 64),
        ["models.small_gpt2:", "64 positions", "256"],
    ),
    "no room for a response": (put("text", "max_tokens", 160), ["text:", "no room"]),
    "no positions for an answer": (
        put("evaluation", "max_new_tokens", 128),
        ["models.small_gpt2:", "256 positions", "288"],
    ),
    "no model type": (
        put("models", "small_gpt2", "architecture", {"n_embd": 8}),
        ["models.small_gpt2.architecture:", "model_type"],
    ),
    "revision that is no commit": (
        put("models", "mine", {"source": "hub", "repository": "a/b", "revision": "main"}),
        ["models.mine.revision:", '"main"'],
    ),
    "training seed twice": (
        put("experiments", "same_tokenizer", "seeds", [1, 2, 1]),
        ["experiments.same_tokenizer.seeds:", "more than once: 1"],
    ),
    "decode seed twice": (
        put("evaluation", "decode_seeds", [10, 10]),
        ["evaluation.decode_seeds:", "more than once: 10"],
    ),
    "negative seed": (
        put("experiments", "same_tokenizer", "seeds", [-1]),
        ["experiments.same_tokenizer.seeds[0]:", "-1"],
    ),
    "several seeds of greedy decoding": (put("evaluation", "decode_seeds", [10, 20]), ["evaluation:", "greedy"]),
    "compiling weights that are taken apart": (
        put("hardware", {"compile": True, "engine": "deepspeed", "zero_stage": 3}),
        ["hardware:", "zero_stage"],
    ),
    "name with a slash": (
        put("experiments", "a/b", copy.deepcopy(EMBEDDED["experiments"]["same_tokenizer"])),
        ["a/b", "names consist of"],
    ),
    "name of a folder of results": (
        put("experiments", "teachers", copy.deepcopy(EMBEDDED["experiments"]["same_tokenizer"])),
        ["experiments.teachers:"],
    ),
    "training of a teacher that is not trained": (
        put("teachers", "kelmor_teacher", {"model": "teacher_base", "training": {"epochs": 1}}),
        ["teachers.kelmor_teacher.training:", "no effect"],
    ),
    "unknown key in a difference": (
        put("experiments", "same_tokenizer", "training", {"epoch": 3}),
        ["experiments.same_tokenizer.training.epoch:", "did you mean 'epochs'"],
    ),
    "wrong type in a method's difference": (
        put("methods", "dskd", {"training": {"epochs": "x"}}),
        ["methods.dskd.training.epochs:", '"x"'],
    ),
    "no experiment": (put("experiments", {}), ["experiments:"]),
    "list for keys": (put("training", [1]), ["training:", "[1]"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration(name, good, tmp_path):
    change, words = BAD[name]
    change(good, tmp_path)
    with pytest.raises(UserError) as error:
        config.load(good)
    lines = str(error.value).splitlines()
    assert any(all(word in line for word in words) for line in lines), lines
    assert all(line.startswith("config: ") for line in lines)
    assert len(lines) == 1, lines


def test_all_mistakes_are_reported_together(good):
    good["training"]["epochs"] = 0
    good["evaluation"]["top_p"] = 2.0
    with pytest.raises(UserError) as error:
        config.load(good)
    assert len(str(error.value).splitlines()) == 2


def test_more_gpus_than_there_are(good):
    good["hardware"]["gpus"] = 3
    with pytest.raises(UserError, match=r"config: hardware.gpus: 3 asked for, but this machine has 1"):
        config.check_gpus(config.load(good), here=1)
    config.check_gpus(config.load(good), here=3)


def test_exponent_without_a_dot_is_a_number(good):
    good["training"]["learning_rate"] = "5e-4"
    assert config.load(good).training.learning_rate == 5e-4


def test_identity_ignores_order_and_defaults_and_hardware(good):
    before = Plan(config.load(good))
    other = json.loads(json.dumps(good, sort_keys=True))
    other["training"]["weight_decay"] = 0.01
    other["methods"]["dskd"]["temperature"] = 1
    other["methods"]["sft"] = {}
    other["hardware"] = {"threads": 4, "micro_batch_size": 2, "gpus": 0}
    other["datasets"]["train"]["rows"] = 1500
    after = Plan(config.load(other))
    for experiment, variants in before.variants.items():
        for variant in variants:
            assert canonical(before.run(experiment, variant)) == canonical(after.run(experiment, variant))


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (put("methods", "dskd", {"objective": "forward_kl", "temperature": 3.0}), {"dskd"}),
        (
            put("teachers", "kelmor_teacher", "training", {"epochs": 1, "batch_size": 32}),
            {"seqkd", "vanilla_kd", "dskd"},
        ),
        (put("training", "learning_rate", 1e-3), {"sft", "seqkd", "vanilla_kd", "dskd"}),
        (put("training", "teacher", "live"), {"vanilla_kd", "dskd"}),
        (
            put("datasets", "train", {"source": "embedded", "split": "train", "seed": 2}),
            {"sft", "seqkd", "vanilla_kd", "dskd"},
        ),
        (put("evaluation", "max_new_tokens", 32), set()),
    ],
)
def test_identity_holds_what_decides_the_numbers(good, tmp_path, change, changed):
    before = Plan(config.load(copy.deepcopy(good)))
    change(good, tmp_path)
    after = Plan(config.load(good))
    variants = before.variants["same_tokenizer"]
    assert {v for v in variants if before.run("same_tokenizer", v) != after.run("same_tokenizer", v)} == changed


def test_identity_of_a_file_is_its_content(good, tmp_path):
    row = json.dumps({"instruction": "a", "output": "b"})
    for name in ("one", "two"):
        (tmp_path / name).write_text(row)
    good["datasets"]["mine"] = {"source": "file", "path": str(tmp_path / "one")}
    first = Plan(config.load(copy.deepcopy(good))).data("mine")
    good["datasets"]["mine"]["path"] = str(tmp_path / "two")
    assert Plan(config.load(copy.deepcopy(good))).data("mine") == first
    (tmp_path / "two").write_text(row + "\n" + row)
    assert Plan(config.load(good)).data("mine") != first


def test_list_of_objectives_becomes_variants(good):
    good["methods"]["vanilla_kd"] = {"objective": ["forward_kl", "reverse_kl"], "temperature": 1.0}
    plan = Plan(config.load(good))
    assert list(plan.variants["same_tokenizer"]) == [
        "sft",
        "seqkd",
        "vanilla_kd.forward_kl",
        "vanilla_kd.reverse_kl",
        "dskd",
    ]
    assert plan.blocks == {"same_tokenizer": {"vanilla_kd": ["vanilla_kd.forward_kl", "vanilla_kd.reverse_kl"]}}
    assert plan.variants["same_tokenizer"]["vanilla_kd.reverse_kl"].objective == "reverse_kl"


def test_reference_page_is_current(capsys):
    reference.main()
    assert (ROOT / "config/README.md").read_text() == capsys.readouterr().out, "run `make docs`"
