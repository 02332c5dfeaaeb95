"""The parts of a teacher's cache, and the manifest that makes one of them. Needs no PyTorch."""

from pathlib import Path

from kdbench import files
from kdbench.errors import UserError
from kdbench.settings import CACHE_PARTS

KIND, PART_KIND = "teacher cache", "part of a teacher cache"
HIDDEN, HEAD = "hidden.safetensors", "head.safetensors"
_SHARED = ("teacher", "tokens", "dtype", "width", "vocabulary")


def part_name(part: int) -> str:
    """The folder of a part within the cache."""
    return f"part{part}"


def parts_of_job(number: int, jobs: int) -> range:
    """The parts that a job writes.

    Args:
        number: of the job, from 1.
        jobs: how many there are; divides CACHE_PARTS (`hardware.cache_jobs`).
    """
    share = CACHE_PARTS // jobs
    return range((number - 1) * share, number * share)


def join(folder) -> dict:
    """Write the manifest of a cache whose parts are all there. Their files stay where they are.

    Args:
        folder: of the cache.

    Returns:
        The manifest: `teacher`, `tokens`, `dtype`, `width`, `vocabulary` as every part has them; `records` and `rows` (response tokens) in
        all; `firsts`: the record with which each part begins.

    Raises:
        UserError: a part is missing, damaged, or of another teacher or other tokens than the first one.
    """
    folder = Path(folder)
    parts = {part_name(part): files.read_manifest(folder / part_name(part), PART_KIND) for part in range(CACHE_PARTS)}
    first, *others = parts.items()
    facts = {name: first[1][name] for name in _SHARED}
    for name, part in others:
        for of in _SHARED:
            if part[of] != facts[of]:
                raise UserError(
                    f"{folder / name} does not belong to {folder / first[0]}: its {of} is {part[of]}, not {facts[of]}; "
                    f"make it anew: snakemake --cores all --forcerun {folder / name / files.MANIFEST}"
                )
    facts |= {of: sum(part[of] for part in parts.values()) for of in ("records", "rows")}
    facts["firsts"] = [part["first"] for part in parts.values()]
    return files.join_manifests(folder, parts, KIND, **facts)
