import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kdbench import cli

SCRIPT = """
import sys, time
from kdbench import cli
from kdbench.errors import UserError

def main():
    {body}

cli.run(main)
"""


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(body=body))
    return path


def run(folder: Path, body: str):
    return subprocess.run([sys.executable, script(folder, body)], capture_output=True, text=True)


def test_mistakes_are_told_line_by_line(tmp_path):
    done = run(tmp_path, r'raise UserError("a.jsonl:3: empty\na.jsonl:7: no JSON")')
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a.jsonl:3: empty\nerror: a.jsonl:7: no JSON\n"


def test_our_own_mistakes_keep_their_traceback(tmp_path):
    done = run(tmp_path, "{}['key']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'key'" in done.stderr


def test_success_and_exit_codes(tmp_path):
    assert run(tmp_path, "print('done')").stdout == "done\n"
    assert run(tmp_path, "sys.exit(7)").returncode == 7


# A stand-in for Snakemake: a program of that name that runs a shell that runs a job, as Snakemake does.
ANCESTOR = """
import subprocess, sys
subprocess.run(["/bin/sh", "-c", f"{sys.executable} {sys.argv[1]} > {sys.argv[2]} 2>&1; exit $?"])
"""


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def started(tmp_path):
    """Start a job under a program of a name: (that program, the job, the job's log)."""
    jobs = []

    def start(name: str, body: str):
        (tmp_path / name).write_text(ANCESTOR)
        job, log = script(tmp_path, body), tmp_path / "log"
        ancestor = subprocess.Popen([sys.executable, tmp_path / name, job, log])
        wait_for(lambda: log.exists() and "working" in log.read_text())
        (found,) = [
            child for child in psutil.Process(ancestor.pid).children(recursive=True) if str(job) in child.cmdline()
        ]
        jobs.append(found)
        return ancestor, found, log

    yield start
    for job in jobs:
        if job.is_running():
            job.kill()


WORK = "print('working', flush=True); time.sleep(60)"


def ended(process: psutil.Process):
    return lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_job_ends_with_its_snakemake(started, stop):
    ancestor, job, log = started("snakemake", WORK)
    ancestor.send_signal(stop)
    ancestor.wait()
    wait_for(ended(job))
    assert f"the Snakemake of this job (process {ancestor.pid}) is gone: stopping" in log.read_text()


def test_job_may_answer_with_a_checkpoint(started):
    catch = "import signal; signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint', flush=True), sys.exit(0))); "
    ancestor, job, log = started("snakemake", catch + WORK)
    ancestor.kill()
    ancestor.wait()
    wait_for(ended(job))
    assert log.read_text().splitlines()[-1] == "checkpoint"


def test_job_ends_although_nobody_listens(started):
    """Its standard error may have ended with Snakemake."""
    ancestor, job, _ = started("snakemake", "import os; print('working', flush=True); os.close(2); time.sleep(60)")
    ancestor.kill()
    ancestor.wait()
    wait_for(ended(job))


def test_job_of_another_program_goes_on(started):
    ancestor, job, _ = started("make", WORK)
    ancestor.kill()
    ancestor.wait()
    time.sleep(2.5)
    assert not ended(job)()
    os.kill(job.pid, signal.SIGKILL)


def test_jobs_import_the_library_from_its_folder(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back in the end
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/other", "/library"]))
    cli.find_in_jobs("/library")
    cli.find_in_jobs("/library")
    assert os.environ["PYTHONPATH"] == os.pathsep.join(["/library", "/other"])
    monkeypatch.delenv("PYTHONPATH")
    cli.find_in_jobs("/library")
    assert os.environ["PYTHONPATH"] == "/library"


def test_jobs_get_the_python_of_this_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cli.find_in_jobs("/library")
    cli.find_in_jobs("/library")
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"
