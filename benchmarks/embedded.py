"""End-to-end time of the embedded experiment with the teacher's cache and without: `python -m benchmarks.embedded` prints it as JSON.

The experiment is shortened: fewer records and epochs, and of its stages only those between the tuned teacher and the finished students,
the writing of the cache included. All others are the same either way.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kdbench import cli
from kdbench.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_WORKFLOW = ("Snakefile", "rules", "workflow", "config", "envs", "src")
METHODS = ("vanilla_kd", "dskd")
SHORT = {
    "datasets": {"corpus": {"rows": 1200}, "train": {"rows": 400}, "dev": {"rows": 40}},
    "teachers": {"kelmor_teacher": {"training": {"epochs": 1, "batch_size": 32}}},
}


def measure(epochs: int = 8, cores: int = 2) -> dict:
    """Seconds from the tuned teacher to the students of all `METHODS`, with the teacher "cached" and "live".

    Args:
        epochs: of the students; half of the experiment's own number by default.
        cores: for Snakemake.
    """
    students = [f"results/same_tokenizer/methods/{method}/seed1/model/manifest.json" for method in METHODS]
    before = ["results/teachers/kelmor_teacher/model/manifest.json"]
    before += [f"results/tokens/small_qwen2+teacher_base/{data}/manifest.json" for data in ("train", "dev")]
    before += [f"results/same_tokenizer/methods/{method}/config.json" for method in METHODS]
    found = {"methods": list(METHODS), "epochs": epochs, "records": SHORT["datasets"]["train"]["rows"]}
    with tempfile.TemporaryDirectory(prefix="kdbench-embedded-") as folder:
        for source in ("cached", "live"):
            copy = Path(folder) / source
            if source == "live":
                shutil.copytree(Path(folder) / "cached", copy)  # with the teacher
                shutil.rmtree(copy / "results" / "same_tokenizer")
            else:
                _copy_workflow(copy)
            config = SHORT | {"training": {"epochs": epochs, "teacher": source}}
            _snakemake(copy, config, before, cores)
            began = time.perf_counter()
            _snakemake(copy, config, students, cores)
            found[source] = {"seconds": time.perf_counter() - began}
    found["ratio"] = found["cached"]["seconds"] / found["live"]["seconds"]
    return found


def _copy_workflow(folder: Path) -> None:
    for part in _WORKFLOW:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / part)


def _snakemake(folder: Path, config: dict, targets: list[str], cores: int) -> None:
    (folder / "short.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--configfile", "short.json", "--", *targets]
    bin = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": bin}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the embedded experiment failed:\n{(done.stdout + done.stderr)[-3000:]}")


def main():
    print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    cli.run(main)
