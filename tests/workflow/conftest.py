"""A copy of the workflow to run and to break, and what Snakemake says it would do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
PARTS = ["Snakefile", "rules", "workflow", "config", "profiles", "envs", "src"]
BIN = Path(sys.executable).parent


class Workflow:
    """A workflow in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def config(self) -> dict:
        return yaml.safe_load((self.folder / "config/config.yaml").read_text())

    @config.setter
    def config(self, content: dict):
        (self.folder / "config/config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def change(self, *path_and_value):
        """Set one value of the configuration."""
        *path, key, value = path_and_value
        content = self.config
        parent = content
        for part in path:
            parent = parent[part]
        parent[key] = value
        self.config = content

    def start(self, *arguments, **options) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"
        }
        command = [sys.executable, "-m", "snakemake", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment | options.pop("env", {}), **pipes | options)

    def run(self, *arguments, cores=2, timeout=600, **options):
        """Run Snakemake to its end: (exit code, what it printed)."""
        process = self.start(*arguments, "--cores", str(cores), **options)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def succeed(self, *arguments, **options) -> str:
        code, output = self.run(*arguments, **options)
        assert code == 0, output
        return output

    def planned(self, *targets) -> set[str]:
        """The jobs of a dry run, as `rule output` (without folders that say nothing); empty where nothing is to be done."""
        output = self.succeed(*targets, "--dry-run")
        assert "Nothing to be done" in output or "Job stats" in output, output
        jobs = set()
        for block in re.split(r"\n(?=(?:local)?rule )", output)[1:]:
            rule = re.match(r"(?:local)?rule (\w+):", block)[1]
            wildcards = re.search(r"^    wildcards: (.*)$", block, re.MULTILINE)
            names = [part.split("=", 1)[1] for part in wildcards[1].split(", ")] if wildcards else []
            jobs.add(" ".join([rule, *names]))
        return jobs - {"all"}

    def copy(self, folder: Path) -> "Workflow":
        """The same, finished files and times included, elsewhere."""
        subprocess.run(["cp", "-a", str(self.folder), str(folder)], check=True)
        return Workflow(folder)


def fresh(folder: Path) -> Workflow:
    """The project's workflow with the tiny configuration, nothing run."""
    folder.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignore)
        else:
            shutil.copy2(source, folder / part)
    shutil.copy2(Path(__file__).parent / "tiny.yaml", folder / "config/config.yaml")
    return Workflow(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Workflow:
    """A workflow that ran to its table. Do not change it: take `workflow`, a copy."""
    workflow = fresh(tmp_path_factory.mktemp("finished") / "kdbench")
    workflow.succeed(cores=8)
    return workflow


@pytest.fixture
def workflow(finished, tmp_path) -> Workflow:
    """A finished workflow of one's own."""
    return finished.copy(tmp_path / "kdbench")


@pytest.fixture
def untouched(tmp_path) -> Workflow:
    """A workflow in which nothing ran yet."""
    return fresh(tmp_path / "kdbench")
