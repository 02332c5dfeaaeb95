"""Change one thing in a finished workflow: exactly what it concerns is planned."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest
import yaml

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

TABLES = {"aggregate"}


def evaluation(run, dataset="test"):
    return {f"generate {run} {dataset}", f"score {run}"}


def method(experiment, variant, seed=1, rule="distill"):
    group = f"{experiment}/methods/{variant}"
    jobs = {f"configure {experiment} {variant}", f"{rule} {experiment} {variant} {seed}", f"collect_scores {group}"}
    return jobs | evaluation(f"{group}/seed{seed}") | TABLES


ALL_RUNS = [
    "teachers/tutor",
    *(f"same/methods/{m}/seed1" for m in ("sft", "seqkd", "vanilla_kd.forward_kl", "vanilla_kd.reverse_kl")),
    *(f"cross/methods/{m}/seed1" for m in ("sft", "uld")),
]
ALL_GROUPS = [run.removesuffix("/seed1") for run in ALL_RUNS]


def test_finished_means_nothing_to_do(workflow):
    assert workflow.planned() == set()


def test_setting_of_a_method(workflow):
    workflow.change("methods", "uld", {"alignment": "byte", "kd_rate": 2.0})
    assert workflow.planned() == method("cross", "uld")


def test_training_seed_added(workflow):
    workflow.change("experiments", "cross", "seeds", [1, 2])
    new = set()
    for variant, rule in (("sft", "sft_student"), ("uld", "distill")):
        new |= method("cross", variant, 2, rule) - {f"configure cross {variant}"}
    assert workflow.planned() == new


def test_decode_seed_added(workflow):
    workflow.change("evaluation", "decode_seeds", [10, 20])
    new = {job for run in ALL_RUNS for job in evaluation(run)}
    assert workflow.planned() == new | {f"collect_scores {group}" for group in ALL_GROUPS} | TABLES


def test_answers_of_other_decode_seeds_are_kept(workflow):
    """They are written by one job, and still only what is missing or of other settings is made."""
    target, run = "results/cross/methods/uld/scores.csv", "results/cross/methods/uld/seed1"
    first, second = (workflow.folder / run / f"evaluation/test/decode{seed}/predictions.jsonl" for seed in (10, 20))
    kept = first.stat()
    workflow.change("evaluation", "decode_seeds", [10, 20])
    workflow.succeed(target)
    assert (first.stat().st_ino, first.stat().st_size) == (kept.st_ino, kept.st_size)
    assert second.read_bytes() != first.read_bytes()
    told = (workflow.folder / "logs/generate/cross/methods/uld/seed1/test.log").read_text()
    assert re.findall("(decode[0-9]+)/.* kept", told) == ["decode10"]
    assert workflow.planned(target) == set()
    workflow.change("evaluation", "decode_seeds", [20])
    assert not {job for job in workflow.planned(target) if job.startswith("generate")}
    workflow.change("evaluation", "max_new_tokens", 9)
    before = second.read_bytes()
    workflow.succeed(target)
    assert second.read_bytes() != before
    assert max(json.loads(line)["tokens"] for line in second.read_text().splitlines()) == 9


def test_data_set_added(workflow):
    workflow.change("evaluation", "datasets", ["test", "shift"])
    new = {job for run in ALL_RUNS for job in evaluation(run, "shift")} | {"prepare_data shift"}
    assert workflow.planned() == new | {f"collect_scores {group}" for group in ALL_GROUPS} | TABLES


def test_method_added(workflow):
    workflow.change("methods", "uld_index", {"method": "uld", "alignment": "index"})
    workflow.change("experiments", "cross", "methods", ["sft", "uld", "uld_index"])
    assert workflow.planned() == method("cross", "uld_index")


def test_objective_added(workflow):
    workflow.change("methods", "vanilla_kd", {"objective": ["forward_kl", "reverse_kl", "js_divergence"]})
    assert workflow.planned() == method("same", "vanilla_kd.js_divergence")


def test_method_removed(workflow):
    workflow.change("experiments", "same", "methods", ["sft", "vanilla_kd"])
    assert workflow.planned() == TABLES


def test_epochs_of_the_teacher(workflow):
    workflow.change("teachers", "tutor", "training", {"epochs": 2})
    expected = {"configure_teacher tutor", "sft_teacher tutor", "collect_scores teachers/tutor"} | evaluation(
        "teachers/tutor"
    )
    expected |= {
        f"{rule} tutor {of} train" for rule in ("cache_teacher", "join_cache") for of in ("student", "foreign")
    }
    expected |= {"generate_answers same seqkd", "tokenize_answers same seqkd"} | method(
        "same", "seqkd", rule="sft_student"
    )
    expected |= (
        method("same", "vanilla_kd.forward_kl") | method("same", "vanilla_kd.reverse_kl") | method("cross", "uld")
    )
    assert workflow.planned() == expected


def test_one_cache_for_all_methods_objectives_seeds_and_epochs(untouched):
    every = {"objective": ["forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl"]}
    untouched.change(
        "methods", {"vanilla_kd": every, "dskd": every, "uld": {}, "uld_byte": {"method": "uld", "alignment": "byte"}}
    )
    same, cross = untouched.config["experiments"].values()
    same |= {"methods": ["vanilla_kd", "dskd"], "seeds": [1, 2, 3]}
    cross |= {"methods": ["uld", "uld_byte"], "seeds": [1, 2, 3], "training": {"epochs": 5}}
    untouched.change("experiments", {"same": same, "cross": cross, "again": cross | {"training": {"epochs": 2}}})
    jobs = untouched.planned()
    assert len([job for job in jobs if job.startswith("distill ")]) == 3 * (8 + 2 + 2)
    once = {f"{rule} tutor {of} train" for rule in ("cache_teacher", "join_cache") for of in ("student", "foreign")}
    assert {job for job in jobs if "cache" in job} == once
    untouched.change("hardware", {"cache_jobs": 4})
    more = {f"cache_teacher_{job} tutor {of} train" for job in (2, 3, 4) for of in ("student", "foreign")}
    assert untouched.planned() == jobs | more


def test_decoding_changed(workflow):
    workflow.change("evaluation", "max_new_tokens", 9)
    expected = {job for run in ALL_RUNS for job in evaluation(run)} | {
        f"collect_scores {group}" for group in ALL_GROUPS
    }
    assert workflow.planned() == expected | TABLES


def nothing_keys(workflow):
    content = workflow.config
    workflow.config = {key: content[key] for key in sorted(content, reverse=True)}


def nothing_default(workflow):
    workflow.change("training", "weight_decay", 0.01)
    workflow.change("datasets", "corpus", {"source": "embedded", "rows": 96, "seed": 1, "split": "corpus"})


def nothing_comment(workflow):
    path = workflow.folder / "config/config.yaml"
    path.write_text("# a comment\n" + path.read_text())


def nothing_hardware(workflow):
    workflow.change(
        "hardware",
        {
            "gpus": 0,
            "memory_gb": 99,
            "disk_gb": 1,
            "threads": 2,
            "micro_batch_size": 3,
            "checkpoint_seconds": 1.0,
            "cache_jobs": 4,
        },
    )


def nothing_touch(workflow):
    for part in ("workflow", "rules", "Snakefile", "src", "config"):
        subprocess.run(["find", str(workflow.folder / part), "-exec", "touch", "{}", "+"], check=True)


def nothing_checkout(workflow):
    """Times are lost, as in a fresh checkout or a copy without them: sources get new times in any order."""
    for index, path in enumerate(sorted(workflow.folder.glob("workflow/scripts/*.py"))):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (time.time() + index, time.time() + index))


def nothing_intermediate(workflow):
    shutil.rmtree(workflow.folder / "results/teachers/tutor/cache")
    shutil.rmtree(workflow.folder / "results/tokens")
    shutil.rmtree(workflow.folder / "results/cross/methods/uld/seed1/model")


def nothing_other_code(workflow):
    path = workflow.folder / "src/kdbench/methods/dskd.py"
    path.write_text(path.read_text() + "\n# a remark\n")


@pytest.mark.parametrize(
    "change",
    [
        nothing_keys,
        nothing_default,
        nothing_comment,
        nothing_hardware,
        nothing_touch,
        nothing_checkout,
        nothing_intermediate,
        nothing_other_code,
    ],
)
def test_nothing(workflow, change):
    change(workflow)
    assert workflow.planned() == set()


def test_more_cores_or_another_profile(workflow):
    for arguments in (["--cores", "8"], ["--workflow-profile", "none"], ["--set-resources", "distill:mem_mb=1"]):
        process = workflow.start("--dry-run", *arguments, *([] if "--cores" in arguments else ["--cores", "1"]))
        output, _ = process.communicate(timeout=120)
        assert "Nothing to be done" in output, output


def test_copied_elsewhere_without_times(workflow, tmp_path):
    shutil.copytree(workflow.folder, tmp_path / "moved", copy_function=shutil.copyfile)
    moved = type(workflow)(tmp_path / "moved")
    heavy = {
        "sft_teacher",
        "cache_teacher",
        "join_cache",
        "sft_student",
        "distill",
        "generate_answers",
        "generate",
        "tokenize",
        "download_model",
    }
    assert not {job for job in moved.planned() if job.split()[0] in heavy}


def test_version_of_a_method(workflow):
    path = workflow.folder / "src/kdbench/methods/uld.py"
    path.write_text(path.read_text().replace("version = 1", "version = 2"))
    assert workflow.planned() == method("cross", "uld")


def test_one_method_alone(untouched):
    jobs = untouched.planned("results/cross/methods/uld/table.csv")
    assert "distill cross uld 1" in jobs
    assert not [job for job in jobs if "sft_student" in job or job.startswith("distill same")]
    assert "aggregate" not in jobs


def test_all_objectives_of_a_method(untouched):
    jobs = untouched.planned("results/same/methods/vanilla_kd/table.csv")
    assert {"distill same vanilla_kd.forward_kl 1", "distill same vanilla_kd.reverse_kl 1"} <= jobs
    assert not [job for job in jobs if "seqkd" in job or job.startswith("sft_student")]


def test_data_file_edited(untouched, tmp_path):
    """A file of one's own: its content decides, not its time; and an edit reaches the identity of every run that reads it."""
    rows = "".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(8))
    (untouched.folder / "mine.jsonl").write_text(rows)
    config = untouched.config
    config["datasets"]["train"] = {"source": "file", "path": "mine.jsonl"}
    config["experiments"] = {"cross": config["experiments"]["cross"] | {"methods": ["sft"]}}
    config["models"]["foreign"]["tokenizer"]["train_on"] = "corpus"
    untouched.config = yaml.safe_load(yaml.safe_dump(config))
    untouched.succeed("results/cross/methods/sft/table.csv")
    os.utime(untouched.folder / "mine.jsonl")
    assert untouched.planned("results/cross/methods/sft/table.csv") == set()
    (untouched.folder / "mine.jsonl").write_text(rows.replace("say", "tell"))
    jobs = untouched.planned("results/cross/methods/sft/table.csv")
    assert {"prepare_data train", "configure cross sft", "sft_student cross sft 1"} <= jobs
    assert not [job for job in jobs if job.startswith(("sft_teacher", "download_model"))]
