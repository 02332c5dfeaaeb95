"""A few lines at the end of a run: what was made and where, how long it took; or what failed, why, and what to try."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench import files

_JOBS = 5  # failed jobs that are told in full
_LINES = 10  # last lines of a log
_ROWS = 30  # a longer table is not shown
_SPREAD = "_std"

_HINTS = [
    (
        r"out of memory|OUT_OF_MEMORY|oom_kill|MemoryError|Cannot allocate memory|exit status 137|SIGKILL",
        "memory ran out, it seems: lower hardware.micro_batch_size (or generation_batch_size), or raise hardware.memory_gb",
    ),
    (r"TIMEOUT", "raise hardware.runtime_hours"),
    (r"No space left on device|Disk quota exceeded", "make room on the disk; what was finished is kept"),
    (r"in use by process", "another run works on this; wait for it or end it"),
    (r"not finite", "lower training.learning_rate, or look at the records that the line names"),
]

_ERROR = re.compile(r"^Error in rule (?P<rule>[^\s:,]+)[^\n]*\n(?P<facts>(?:^    [^\n]*\n)*)", re.MULTILINE)
_SHELL = re.compile(r"^    shell:\n(?P<command>(?:^        [^\n]*\n)*?)^        \(command exited", re.MULTILINE)
# Of jobs that fail at the same time these may all come before all of the errors, so that they are told apart by the command.
_STATUS = re.compile(
    r"^Command '(?P<command>(?s:.*?))' (?P<status>returned non-zero exit status \d+|died with <Signals\.\w+)",
    re.MULTILINE,
)
_MISSING = re.compile(
    r"^MissingOutputException in rule (?P<rule>\S+) in file .*\nJob (?P<job>\d+) .*\n(?P<file>\S+)", re.MULTILINE
)


def success(results, benchmarks, since: float) -> str:
    """What a run made, the table where it is small, and the seconds of each stage.

    Args:
        results: the results folder.
        benchmarks: folder of Snakemake's benchmark files, `<rule>/.../*.tsv`.
        since: when the run began, seconds since 1970; older files are of earlier runs.
    """
    tables = [
        path
        for path in sorted(Path(results).rglob("table.*"), key=lambda path: (len(path.parts), path))
        if path.suffix in (".csv", ".md") and path.stat().st_mtime >= since
    ]
    lines = ["", "Made:", *(f"  {path}" for path in tables)] if tables else ["", "Done; no table was asked for."]
    if tables and tables[0].suffix == ".csv":
        lines += _table(tables[0])
    return "\n".join([*lines, *_stages(Path(benchmarks), since)])


def _table(path: Path) -> list[str]:
    """A summary of `kdbench.evaluation.tables` as aligned text; nothing where it is long."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not 0 < len(rows) <= _ROWS:
        return []
    measures = [name.removesuffix(_SPREAD) for name in rows[0] if name.endswith(_SPREAD)] + ["average"]
    cells = [["experiment", "method", *measures]]
    for row in rows:
        scores = [" ± ".join(filter(None, (row[name], row.get(name + _SPREAD)))) for name in measures]
        cells.append([row["experiment"], row["variant"] or row["method"], *scores])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["ROUGE-L:"] + [
        "  " + "  ".join(f"{text:{'<' if column < 2 else '>'}{widths[column]}}" for column, text in enumerate(line))
        for line in cells
    ]


def _stages(benchmarks: Path, since: float) -> list[str]:
    spent = defaultdict(list)
    for path in sorted(benchmarks.rglob("*.tsv")):
        if path.stat().st_mtime >= since:
            rule = path.relative_to(benchmarks).parts[0].removesuffix(".tsv")
            with open(path, encoding="utf-8", newline="") as file:
                spent[rule] += [float(row["s"]) for row in csv.DictReader(file, delimiter="\t")]
    if not spent:
        return []
    width = max(map(len, spent))
    ordered = sorted(spent.items(), key=lambda item: (-sum(item[1]), item[0]))
    return ["Time by stage:"] + [
        f"  {rule:<{width}}  {len(times):>4} jobs  {sum(times):>8.1f} s  longest {max(times, default=0):.1f} s"
        for rule, times in ordered
    ]


@dataclass(frozen=True)
class _Failure:
    rule: str
    logs: tuple[str, ...]
    said: str  # by Snakemake or a cluster


def failure(logs: Sequence) -> str:
    """Which jobs failed for good, the ends of their logs, and what to try. What a script tells in one line stands alone.

    Args:
        logs: Snakemake's own log files of the run, as `onerror` has them in `log`.
    """
    text = "".join(_text(Path(log)) for log in logs)
    failures = list(dict.fromkeys(_failures(text)))
    lines = [""]
    for one in failures[:_JOBS]:
        content = [line for log in one.logs for line in _tail(Path(log))]
        errors = [line for line in content if line.startswith("error:")]
        lines.append(f"Failed: {one.rule}" + (f" (log: {', '.join(one.logs)})" if one.logs else ""))
        lines += [f"  {line}" for line in errors or ([one.said] if one.said else []) + content]
        lines += [f"  try: {hint}" for hint in _hints("\n".join([one.said, *content]))]
    if len(failures) > _JOBS:
        lines.append(f"... and {len(failures) - _JOBS} more failed jobs: see {', '.join(map(str, logs))}")
    lines.append("Run the same command again: finished parts are kept, trainings go on from their last checkpoint.")
    return "\n".join(lines)


def _failures(text: str) -> Iterator[_Failure]:
    """What a Snakemake log calls an error, but for jobs that were started again."""
    for found in _ERROR.finditer(text):
        job = re.search(r"^    jobid: (\d+)", found["facts"], re.MULTILINE)
        if job and _restarts(job[1], text[found.end() :]):
            continue
        log = re.search(
            r"^    log: (.*?)(?: \(check log file\(s\) for error details\))?$", found["facts"], re.MULTILINE
        )
        message = re.search(r"^    message: (?!None$)(.*)$", found["facts"], re.MULTILINE)
        said = message[1] if message else _status(found["facts"], text)
        yield _Failure(found["rule"], tuple(log[1].split(", ")) if log else (), said)
    for found in _MISSING.finditer(text):
        if not _restarts(found["job"], text[found.end() :]):
            yield _Failure(found["rule"], (), f"it ended without an error, but {found['file']} is not there")


def _status(facts: str, text: str) -> str:
    """How the command of a job ended, the last time; nothing where Snakemake does not say it."""
    shell = _SHELL.search(facts)
    if shell is None:
        return ""
    command = "".join(shell["command"].split())
    # Snakemake puts `set` before it.
    ends = [f["status"] for f in _STATUS.finditer(text) if "".join(f["command"].split()).endswith(command)]
    return ends[-1].replace("<Signals.", "") if ends else ""


def _restarts(job: str, later: str) -> bool:
    return f"Trying to restart job {job}." in later


def _text(log: Path) -> str:
    """What a log says; nothing where it cannot be read, since a summary must not be one more failure."""
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _tail(log: Path) -> list[str]:
    return [line for line in files.tail(log) if line.strip()][-_LINES:]


def _hints(text: str) -> list[str]:
    return [hint for pattern, hint in _HINTS if re.search(pattern, text)]
