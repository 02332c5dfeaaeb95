"""What the figures of a run say: missed ceilings, what became slower, tables."""

from collections.abc import Iterator

# Multiples of one padded-to-512 SFT step of the same student, and GB of memory in all: at most, the teacher live.
CEILINGS = {
    "sft": (0.35, 1.5),
    "vanilla_kd": (0.40, 2.0),
    "dskd": (0.65, 2.4),
    "dskd_cma": (0.70, 2.6),
    "mined": (0.45, 2.0),
    "uld": (2.0, 3.0),
    "multilevel_ot": (0.50, 2.4),
    "mcw_kd": (1.0, 3.0),
}
# What the time of a step is split into; see docs/benchmarks.md.
PARTS = (
    "collate",
    "teacher_body",
    "teacher_head",
    "student_forward",
    "loss",
    "optimal_transport",
    "backward",
    "optimizer",
    "other",
)
_MORE_MEMORY = 1.05  # growth of peak memory that is worth a word: below, it is the allocator's


def complete(found: dict) -> None:
    """Add the ratios to the floor and to fine-tuning to the measured methods, as far as these are measured."""
    floor, sft = found["floor"], found["methods"].get("sft", {}).get("live")
    for _, _, of in _measurements(found):
        of["ratio_to_floor"] = of["seconds"] / floor["seconds"]
        of["cpu_ratio_to_floor"] = of["cpu_seconds"] / floor["cpu_seconds"]
        if sft is not None:
            of["ratio_to_sft"] = of["seconds"] / sft["seconds"]


def missed(found: dict) -> list[str]:
    """A line for each ceiling that a measured method is above."""
    lines = []
    for method, (ratio, memory) in CEILINGS.items():
        of = found["methods"].get(method, {}).get("live")
        if of is None:
            continue
        if of["ratio_to_floor"] > ratio:
            lines.append(
                f"{method}: a step takes {of['ratio_to_floor']:.2f} of the floor's time, the ceiling is {ratio:.2f} "
                f"(in CPU seconds {of['cpu_ratio_to_floor']:.2f})"
            )
        if of["peak_gb"] > memory:
            lines.append(f"{method}: peak memory is {of['peak_gb']:.2f} GB, the ceiling is {memory:.1f} GB")
    return lines


def slower(found: dict, before: dict) -> list[str]:
    """A line for each measurement that became slower, or larger, than an earlier run's by more than noise.

    Machines differ, so multiples of the floor of the same run are compared. Noise is what the steps of both runs are spread by: a method
    became slower if its fastest step, by the slowest of the floor, takes longer than its slowest step did by the fastest of the floor.

    Args:
        found: this run.
        before: the earlier one, of the same shapes and records; else nothing is compared.
    """
    if before.get("setup") != found["setup"]:
        return []
    earlier = {(method, source): of for method, source, of in _measurements(before)}
    lines = []
    for method, source, of in _measurements(found):
        old = earlier.get((method, source))
        if old is None:
            continue
        least, most = _spread(of, found["floor"])[0], _spread(old, before["floor"])[1]
        if least > most:
            lines.append(
                f"{method}, teacher {source}: {of['ratio_to_floor']:.2f} of the floor's time, before {old['ratio_to_floor']:.2f}"
            )
        if of["peak_gb"] > _MORE_MEMORY * old["peak_gb"]:
            lines.append(f"{method}, teacher {source}: {of['peak_gb']:.2f} GB, before {old['peak_gb']:.2f} GB")
    return lines


def _spread(of: dict, floor: dict) -> tuple[float, float]:
    """Least and largest multiple of the floor's time that the steps allow."""
    return of["seconds_min"] / floor["seconds_max"], of["seconds_max"] / floor["seconds_min"]


def _measurements(found: dict) -> Iterator[tuple[str, str, dict]]:
    for method, sources in found["methods"].items():
        for source, of in sources.items():
            yield method, source, of


def tables(found: dict) -> str:
    """All figures in Markdown."""
    floor, machine = found["floor"], found["machine"]
    blocks = [
        "# What a distillation step costs",
        "Made by `make bench`; the columns are explained in docs/benchmarks.md.",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['threads']} thread(s), torch "
        f"{machine['torch']}; {machine['started']}. {found['setup']['records'].capitalize()} records, "
        f"{found['setup']['batch_size']} in a step.",
        f"Floor: {floor['seconds']:.2f} s ({floor['seconds_min']:.2f} to {floor['seconds_max']:.2f}), "
        f"{floor['cpu_seconds']:.2f} CPU s, {floor['peak_gb']:.2f} GB.",
        _methods(found),
        _splits(found),
    ]
    scaling = found.get("scaling", {})
    for name, title in (("batch_size", "Records in a step"), ("vocabulary", "Rows of both heads")):
        if name in scaling:
            rows = [
                [
                    size,
                    f"{of['response_tokens']}",
                    f"{of['seconds']:.2f}",
                    f"{of['cpu_seconds']:.2f}",
                    f"{of['peak_gb']:.2f}",
                ]
                for size, of in scaling[name].items()
            ]
            title = f"{title} ({scaling['method']}, teacher live)"
            blocks.append(_table([title, "response tokens", "s", "CPU s", "GB"], rows))
    if "settings" in found:
        rows = [
            [name, of["value"], f"{of['seconds']:.3f}", f"{of['cpu_seconds']:.3f}", f"{of['ratio']:.2f}"]
            for name, of in found["settings"].items()
        ]
        blocks.append(_table(["`hardware` setting", "set to", "s", "CPU s", "by the default's"], rows))
    if "data_parallel" in found:
        of = found["data_parallel"]
        blocks.append(
            f"Two processes of one thread: {of['ratio']:.2f} times as fast as one ({of['method']}, teacher {of['teacher']}, "
            f"{of['batch_size']} records in a step: {of['one']['seconds']:.2f} s, {of['two']['seconds']:.2f} s)."
        )
    if "generation" in found:
        of = found["generation"]
        blocks.append(f"Generation: {of['ratio_to_plain']:.2f} times the tokens per second of plain `generate` calls.")
    if "embedded" in found:
        of = found["embedded"]
        blocks.append(
            f"Embedded experiment, shortened, from the tuned teacher to the students: {of['cached']['seconds']:.0f} s with the teacher "
            f"cached, {of['live']['seconds']:.0f} s with it live."
        )
    return "\n\n".join(blocks) + "\n"


def _methods(found: dict) -> str:
    rows = []
    for method, source, of in _measurements(found):
        ratio, memory = CEILINGS.get(method, (None, None)) if source == "live" else (None, None)
        to_sft = of.get("ratio_to_sft")
        rows.append(
            [
                method,
                source,
                f"{of['seconds']:.3f} ({of['seconds_min']:.3f} to {of['seconds_max']:.3f})",
                f"{of['cpu_seconds']:.3f}",
                f"{of['ratio_to_floor']:.2f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{of['cpu_ratio_to_floor']:.2f}",
                "" if to_sft is None else f"{to_sft:.2f}",
                f"{of['tokens_per_second']:.0f}",
                f"{of['peak_gb']:.2f}",
                "" if memory is None else f"{memory:.1f}",
            ]
        )
    titles = [
        "method",
        "teacher",
        "s (min to max)",
        "CPU s",
        "by floor",
        "at most",
        "CPU by floor",
        "by sft",
        "tokens/s",
        "GB",
        "at most",
    ]
    return _table(titles, rows)


def _splits(found: dict) -> str:
    measured = [(method, source, of["split"]) for method, source, of in _measurements(found) if "split" in of]
    if not measured:
        return ""
    rows = [[method, source, *(f"{split[part]:.3f}" for part in PARTS)] for method, source, split in measured]
    return _table(["CPU s", "teacher", *(part.replace("_", " ") for part in PARTS)], rows)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
