"""What is told at the end, from the logs and benchmark files of a real Snakemake."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdbench import summary

HEAD = """
import json
def told(log):
    with open("told.json", "w") as file:
        json.dump(log, file)
onsuccess: told(log)
onerror: told(log)
"""

FAILING = (
    HEAD
    + """
rule all:
    input: "out/a.txt", "out/b.txt", "out/silent.txt", "out/missing.txt", "out/killed.txt", "out/flaky.txt", "out/full.txt"
rule mistaken:
    output: "out/{x,[ab]}.txt"
    log: "logs/mistaken/{x}.log"
    retries: 1
    shell: "(seq 30; echo 'error: config: models.{wildcards.x}: no such model' >&2; exit 2) > {log} 2>&1"
rule silent:
    output: "out/silent.txt"
    shell: "exit 3"
rule missing:
    output: "out/missing.txt"
    shell: "true"
rule killed:
    output: "out/killed.txt"
    log: "logs/killed.log"
    shell: "python3 -c 'import os; print(1, flush=True); os.kill(os.getpid(), 9)' > {log} 2>&1"
rule flaky:
    output: "out/flaky.txt"
    log: "logs/flaky.log"
    retries: 1
    shell: "(echo tried; test -e logs/once && touch {output} || (touch logs/once; exit 1)) > {log} 2>&1"
rule full:
    output: "out/full.txt"
    log: "logs/full.log"
    shell: "(seq 100; printf '50%%\\\\r100%%\\\\nOSError: [Errno 28] No space left on device\\\\n'; exit 1) > {log} 2>&1"
"""
)

WORKING = (
    HEAD
    + """
rule all:
    input: expand("out/{x}.txt", x=range(3)), "results/table.csv"
rule train:
    output: "out/{x}.txt"
    benchmark: "results/benchmarks/train/pair/{x}.tsv"
    shell: "sleep 0.3; touch {output}"
rule aggregate:
    output: "results/table.csv", "results/table.md"
    benchmark: "results/benchmarks/aggregate.tsv"
    shell: "cp table.csv {output[0]}; touch {output[1]}"
"""
)

TABLE = """experiment,method,student,teacher,objective,variant,dolly,dolly_std,average,training_seeds,decode_seeds,std_over
pair,teacher,,big,,,40.10,,40.10,1,1,
pair,vanilla_kd,small,big,reverse_kl,vanilla_kd.reverse_kl,21.54,0.31,21.54,3,1,training seeds
"""


def snakemake(folder: Path, snakefile: str, *arguments) -> tuple[int, list[str]]:
    """Exit code, and Snakemake's own logs as it hands them to `onerror` and `onsuccess`."""
    (folder / "Snakefile").write_text(snakefile)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--keep-going", "--latency-wait", "1", *arguments]
    code = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
    return code, json.loads((folder / "told.json").read_text())


def by_job(text: str) -> dict[str, list[str]]:
    """The lines below each `Failed:`."""
    found = {}
    for line in text.splitlines():
        if line.startswith("Failed: "):
            lines = found[line.removeprefix("Failed: ")] = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


@pytest.mark.slow
def test_failures_of_a_real_run(tmp_path, monkeypatch):
    code, logs = snakemake(tmp_path, FAILING)
    assert code == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, "_JOBS", 100)
    text = summary.failure(logs)
    told = by_job(text)
    assert set(told) == {
        "mistaken (log: logs/mistaken/a.log)",
        "mistaken (log: logs/mistaken/b.log)",
        "silent",
        "missing",
        "killed (log: logs/killed.log)",
        "full (log: logs/full.log)",
    }  # fmt: skip  (each once, however often it was tried; flaky worked in the end)
    assert told["mistaken (log: logs/mistaken/a.log)"] == ["error: config: models.a: no such model"]
    assert told["silent"] == ["returned non-zero exit status 3"]
    assert told["missing"] == ["it ended without an error, but out/missing.txt is not there"]
    killed = told["killed (log: logs/killed.log)"]
    assert killed[:2] == ["returned non-zero exit status 137", "1"]
    assert "hardware.micro_batch_size" in killed[2]
    full = told["full (log: logs/full.log)"]
    assert full[-3:-1] == ["100%", "OSError: [Errno 28] No space left on device"]
    assert "make room" in full[-1]
    assert len(full) == 1 + summary._LINES + 1
    assert text.splitlines()[-1].startswith("Run the same command again")


@pytest.mark.slow
def test_success_of_a_real_run(tmp_path):
    (tmp_path / "table.csv").write_text(TABLE)
    begun = time.time()
    code, _ = snakemake(tmp_path, WORKING)
    assert code == 0
    results = tmp_path / "results"
    lines = summary.success(results, results / "benchmarks", begun).splitlines()
    assert lines[1:4] == ["Made:", f"  {results}/table.csv", f"  {results}/table.md"]
    assert lines[4:8] == [
        "ROUGE-L:",
        "  experiment  method                        dolly  average",
        "  pair        teacher                       40.10    40.10",
        "  pair        vanilla_kd.reverse_kl  21.54 ± 0.31    21.54",
    ]
    assert lines[8] == "Time by stage:"
    train = re.fullmatch(r"  train +3 jobs +(\d+\.\d) s  longest (\d+\.\d) s", lines[9])
    total, longest = map(float, train.groups())
    assert 0 < longest <= total
    assert lines[10].split()[:3] == ["aggregate", "1", "jobs"]
    later = summary.success(results, results / "benchmarks", time.time() + 1)
    assert later.splitlines() == ["", "Done; no table was asked for."]


def run_log(folder: Path, *errors: str) -> list[str]:
    path = folder / "snakemake.log"
    path.write_text("Building DAG of jobs...\n" + "".join(errors) + "Exiting because a job execution failed.\n")
    return [str(path)]


def error(job: int, rule: str, message: str = "None", log: str = "") -> str:
    """As Snakemake 9 writes it."""
    log = f"    log: {log} (check log file(s) for error details)\n" if log else ""
    return f"[Tue Nov 24 13:12:24 2026]\nError in rule {rule}:\n    message: {message}\n    jobid: {job}\n    output: o/{job}\n{log}"


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("SLURM-job '11' failed, SLURM status is: 'TIMEOUT'. For further error details see the log", "hardware.runtime_hours"),
        ("SLURM-job '11' failed, SLURM status is: 'OUT_OF_MEMORY'.", "hardware.memory_gb"),
        ("SLURM-job '11' failed, SLURM status is: 'FAILED'.", None),
    ],
)  # fmt: skip
def test_what_a_cluster_says(tmp_path, message, hint):
    (lines,) = by_job(summary.failure(run_log(tmp_path, error(3, "distill", message)))).values()
    assert lines[0] == message
    assert [hint in line for line in lines[1:]] == ([True] if hint else [])


def test_all_logs_of_a_job_are_read(tmp_path):
    first, second = tmp_path / "rule.log", tmp_path / "slurm.log"
    first.write_text("step 5\n")
    second.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=11.batch\n")
    text = summary.failure(run_log(tmp_path, error(3, "distill", log=f"{first}, {second}")))
    assert "step 5" in text
    assert "hardware.memory_gb" in text


def test_many_failures_are_counted(tmp_path):
    jobs = [error(job, "generate", log=f"{tmp_path}/{job}.log") for job in range(summary._JOBS + 3)]
    text = summary.failure(run_log(tmp_path, *jobs, *jobs))
    assert text.count("Failed: generate") == summary._JOBS
    assert "... and 3 more failed jobs: see" in text


def test_a_retry_that_fails_too_is_told(tmp_path):
    tried = [
        error(4, "score"),
        "Trying to restart job 4.\n",
        error(5, "align"),
        "Trying to restart job 5.\n",
        error(4, "score"),
    ]
    assert list(by_job(summary.failure(run_log(tmp_path, *tried)))) == ["score"]


def test_jobs_that_fail_at_once_keep_their_own_status(tmp_path):
    commands = {"silent": "exit 3", "killed": "python  x.py\n        --more"}
    ends = [
        'RuleException:\nCalledProcessError in file "Snakefile", line 9:\n'
        "Command 'set -euo pipefail;  exit 3' returned non-zero exit status 3.\n",
        'RuleException:\nCalledProcessError in file "Snakefile", line 8:\n'
        "Command 'set -euo pipefail;  python  x.py\n  --more' died with <Signals.SIGKILL: 9>.\n",
    ]
    errors = [
        error(job, rule) + f"    shell:\n        {command}\n        (command exited with non-zero exit code)\n"
        for job, (rule, command) in enumerate(commands.items())
    ]
    told = by_job(summary.failure(run_log(tmp_path, *ends, *errors)))
    assert told["silent"] == ["returned non-zero exit status 3"]
    assert told["killed"][0] == "died with SIGKILL"


@pytest.mark.parametrize("logs", [[], ["absent.log"], ["."]])
def test_without_a_log(logs):
    (empty, last) = summary.failure(logs).splitlines()
    assert empty == ""
    assert last.startswith("Run the same command again")


def test_log_of_a_job_that_is_absent_or_no_text(tmp_path):
    (tmp_path / "bytes.log").write_bytes(b"\xff\xfe error\n")
    logs = run_log(tmp_path, error(3, "a", log=f"{tmp_path}/absent.log"), error(4, "b", log=f"{tmp_path}/bytes.log"))
    told = by_job(summary.failure(logs))
    assert told == {f"a (log: {tmp_path}/absent.log)": [], f"b (log: {tmp_path}/bytes.log)": ["\ufffd\ufffd error"]}


def test_long_tables_are_not_shown(tmp_path):
    head, _, row = TABLE.splitlines()
    for rows, shown in ((summary._ROWS, True), (summary._ROWS + 1, False)):
        (tmp_path / "table.csv").write_text("\n".join([head, *[row] * rows]) + "\n")
        assert ("ROUGE-L:" in summary.success(tmp_path, tmp_path / "benchmarks", 0)) is shown


def test_the_table_of_everything_comes_first_and_older_files_are_not_told(tmp_path):
    for name in ("table.csv", "a/table.csv", "old/table.csv", "a/table.csv.part12"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TABLE.replace("pair", name.split("/")[0]))
    os.utime(tmp_path / "old/table.csv", (1000, 1000))
    old = tmp_path / "benchmarks/train/x.tsv"
    old.parent.mkdir(parents=True)
    old.write_text("s\th:m:s\n5.0\t0:00:05\n")
    os.utime(old, (1000, 1000))
    lines = summary.success(tmp_path, tmp_path / "benchmarks", 2000).splitlines()
    assert lines[2:5] == [f"  {tmp_path}/table.csv", f"  {tmp_path}/a/table.csv", "ROUGE-L:"]
    assert "Time by stage:" not in lines
