import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from kdbench.errors import UserError
from kdbench.locks import Lock, hold_workflow

HOLD = """
import subprocess, sys, time
from kdbench.locks import Lock
lock = Lock(sys.argv[1], "the training")
if sys.argv[2] == "child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
else:
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path, how="60"):
    """Another process that holds a lock; what it printed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path):
    process, _ = hold(tmp_path / "lock")
    yield process
    process.kill()
    process.wait()


def test_second_process_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(UserError) as told:
        Lock(tmp_path / "lock", "the training of x")
    message = str(told.value)
    assert message.startswith(f"the training of x is in use by process {holder.pid} on {socket.gethostname()} since ")
    assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", message)
    assert str(tmp_path / "lock") in message
    assert "\n" not in message


def test_refused_twice_is_refused_the_same(tmp_path, holder):
    """Asking does not wipe out who holds it."""
    told = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            Lock(tmp_path / "lock", "it")
        told.append(str(error.value))
    assert told[0] == told[1]


def test_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = Lock(tmp_path / "lock", "it")
    assert f'"process": {os.getpid()}' in (tmp_path / "lock").read_text()
    lock.release()


def test_programs_that_a_holder_started_do_not_keep_it(tmp_path):
    process, child = hold(tmp_path / "lock", "child")
    process.wait()
    os.kill(int(child), 0)  # it lives
    Lock(tmp_path / "lock", "it").release()
    os.kill(int(child), signal.SIGKILL)


def test_released_lock_is_free(tmp_path):
    Lock(tmp_path / "deep/lock", "it").release()
    lock = Lock(tmp_path / "deep/lock", "it")
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        Lock(tmp_path / "deep/lock", "it")  # also within a process
    lock.release()


def test_holder_that_has_not_yet_said_who_it_is(tmp_path):
    lock = Lock(tmp_path / "lock", "it")
    os.truncate(tmp_path / "lock", 0)
    with pytest.raises(UserError, match="it is in use by another process"):
        Lock(tmp_path / "lock", "it")
    lock.release()


def test_patience(tmp_path):
    process, _ = hold(tmp_path / "lock", "2.0")
    started = time.monotonic()
    with pytest.raises(UserError):
        Lock(tmp_path / "lock", "it", patience=0.3)
    assert 0.3 <= time.monotonic() - started < 2.0
    Lock(tmp_path / "lock", "it", patience=30).release()
    process.wait()


def test_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(UserError, match="cannot be locked \\(No locks available\\)"):
        Lock(tmp_path / "lock", "it")


def test_workflow_folder_of_a_killed_run(tmp_path):
    """Snakemake's own locks outlive it; ours does not, so it tells which of them mean nothing."""
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "0.input.lock").write_text("resources/x\n")
    (locks / "0.output.lock").write_text("results/x\n")
    process, _ = hold(tmp_path / "kdbench.lock")
    with pytest.raises(UserError, match=f"this folder is in use by process {process.pid} "):
        hold_workflow(tmp_path)
    assert len(list(locks.iterdir())) == 2
    process.kill()
    process.wait()
    lock = hold_workflow(tmp_path)
    assert list(locks.iterdir()) == []
    lock.release()


def test_workflow_folder_that_is_new(tmp_path):
    hold_workflow(tmp_path / ".snakemake").release()
