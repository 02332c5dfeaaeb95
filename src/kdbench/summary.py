"""A few lines at the end of a run: what was made and where, how long it took; or what failed, why, and what to try."""

import re
from collections import defaultdict
from pathlib import Path

_SHOWN = 10  # last lines of a log
_HINTS = [
    (
        r"out of memory|MemoryError|Cannot allocate memory|\bKilled\b",
        "lower hardware.micro_batch_size or raise hardware.memory_gb",
    ),
    (r"No space left on device", "make room on the disk; what was finished is kept"),
    (r"in use by process", "another run works on this; wait for it or end it"),
    (r"not finite", "lower training.learning_rate, or look at the records that the line names"),
    (r"is damaged|is stale", "run the command that the line names"),
]


def success(results, benchmarks, since: float) -> str:
    """What a run made, and the seconds of each of its stages.

    Args:
        results: the results folder.
        benchmarks: folder of Snakemake's benchmark files, `<rule>/.../*.tsv`.
        since: when the run began, seconds since 1970; older files are of earlier runs.
    """
    lines = ["", "Made:"]
    tables = [path for path in sorted(Path(results).rglob("table.*")) if path.stat().st_mtime >= since]
    lines += [f"  {path}" for path in tables] or ["  no table"]
    return "\n".join([*lines, *_stages(Path(benchmarks), since)])


def _stages(benchmarks: Path, since: float) -> list[str]:
    spent = defaultdict(list)
    for path in sorted(benchmarks.rglob("*.tsv")):
        if path.stat().st_mtime >= since:
            header, values, *_ = (line.split("\t") for line in path.read_text().splitlines())
            spent[path.relative_to(benchmarks).parts[0].removesuffix(".tsv")].append(
                float(dict(zip(header, values, strict=False))["s"])
            )
    if not spent:
        return []
    width = max(map(len, spent))
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))
    told = [
        f"  {rule:<{width}}  {len(times):>4} jobs  {sum(times):>8.1f} s  longest {max(times):.1f} s"
        for rule, times in ordered
    ]
    return ["Time by stage:", *told]


def failure(snakemake_log) -> str:
    """Which rules failed, the ends of their logs, and what to try.

    Args:
        snakemake_log: Snakemake's own log of the run.
    """
    text = Path(snakemake_log).read_text(encoding="utf-8", errors="replace") if snakemake_log else ""
    lines = [""]
    for rule, log in dict.fromkeys(_failed(text)):
        content = _tail(log)
        lines.append(f"Failed: {rule}" + (f", log {log}" if log else ""))
        errors = [line for line in content if line.startswith("error:")]
        lines += [f"  {line}" for line in errors or content]
        lines += [f"  try: {hint}" for hint in dict.fromkeys(_hints("\n".join(content)))]
    lines.append("Run the same command again: finished parts are kept, trainings go on from their last checkpoint.")
    return "\n".join(lines)


def _failed(text: str):
    """(rule, its log or None) of each error in a Snakemake log."""
    for block in re.split(r"^(?=Error in (?:local)?rule )", text, flags=re.MULTILINE)[1:]:
        rule = re.match(r"Error in (?:local)?rule (\S+?):", block)
        log = re.search(r"^\s+log: (\S+)", block, flags=re.MULTILINE)
        if rule:
            yield rule[1], log[1].rstrip(",") if log else None


def _tail(log: str | None) -> list[str]:
    if log is None or not Path(log).is_file():
        return []
    content = Path(log).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in content.splitlines() if line.strip()][-_SHOWN:]


def _hints(text: str):
    return (hint for pattern, hint in _HINTS if re.search(pattern, text))
