"""Files that are whole or absent, and manifests that say what a folder holds."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from kdbench.errors import UserError

MANIFEST = "manifest.json"
# bytes of a folder, its smallest files first; the others are compared by size alone when it is read: hashing 14 GB at every start is no
# check but a delay
_HASHED_ON_READ = 256 * 2**20


def canonical(value) -> str:
    """One spelling per meaning: JSON with sorted keys, so that the order of keys is no difference."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def fingerprint(value) -> str:
    """A short name (16 hex digits) for anything that JSON can hold."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def sha256(path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # there only if something went wrong


def write_json(path, value) -> None:
    """Canonical content, indented for people."""
    write_text(path, json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n")


def tail(path, size: int = 65536) -> list[str]:
    """The last lines of a text that may be large, from its last so many bytes; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def read_json(path):
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON ({error}): delete it and run again") from None


def write_manifest(folder, kind: str, **facts) -> dict:
    """List the files of a folder with size and sha256, and what else must be known of it, as its `manifest.json`.

    The manifest is written last. It is what the workflow hands on: small, compared by content, and a folder without it is not finished.
    `fingerprint` in it names the content: equal fingerprints mean equal files and facts.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return _write_manifest(folder, facts | {"kind": kind, "files": files})


def join_manifests(folder, parts: dict[str, dict], kind: str, **facts) -> dict:
    """A manifest over folders that are finished already and lie in `folder`: their files stay where they are, and are not read.

    Args:
        folder: gets the `manifest.json`.
        parts: manifest of each part, by the name of its folder.
        kind: what they are together.
        facts: what else must be known of them.
    """
    files = {f"{name}/{file}": of for name, manifest in parts.items() for file, of in manifest["files"].items()}
    return _write_manifest(Path(folder), facts | {"kind": kind, "files": files})


def _write_manifest(folder: Path, content: dict) -> dict:
    manifest = content | {"fingerprint": fingerprint(content)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder, kind: str, remedy: str | None = None) -> dict:
    """Read the manifest of a folder and check the files that it lists.

    Args:
        folder: the folder, or the path of its `manifest.json`.
        kind: what it must hold ("model", "records", "tokens", "alignment", "spelling", "vocabulary", "teacher cache").
        remedy: what to do about damage; by default to force the rule of this very manifest.

    Raises:
        UserError: no manifest, another kind, a missing or changed file; says which and how to make it anew.
    """
    folder = folder_of(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no finished {kind} ({MANIFEST} is missing): run the rule that makes it")
    manifest = read_json(path)
    remedy = remedy or f"make it anew: snakemake --cores all --forcerun {path}"
    if not isinstance(manifest, dict) or not {"kind", "files", "fingerprint"} <= manifest.keys():
        raise UserError(f"{path} is no manifest; {remedy}")
    if manifest["kind"] != kind:
        raise UserError(f"{path} describes {manifest['kind']}, not {kind}: give another folder")
    left = _HASHED_ON_READ
    for name, facts in sorted(manifest["files"].items(), key=lambda entry: entry[1]["bytes"]):
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} is missing; {remedy}")
        if file.stat().st_size != facts["bytes"]:
            raise UserError(f"{file} is damaged ({file.stat().st_size} bytes instead of {facts['bytes']}); {remedy}")
        left -= facts["bytes"]
        if left >= 0 and sha256(file) != facts["sha256"]:
            raise UserError(f"{file} is damaged (its sha256 is not that of {path}); {remedy}")
    return manifest


def check_space(path, needed: int, what: str, advice: str) -> None:
    """Make sure that there is room for what is to be written.

    Args:
        path: what is to be written, a file or folder; need not exist.
        needed: bytes.
        what: what it is, for the message.
        advice: what else can be done about too small a disk than to make room.

    Raises:
        UserError: the file system of `path` has fewer bytes free; says how many of each.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what} {path} needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free: make room, or {advice}"
        )


def allocated(folder) -> int:
    """Bytes that the files of a folder take on the disk; 0 where there is none."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())


def folder_of(path) -> Path:
    """The folder that a path names, be it the folder or its manifest."""
    path = Path(path)
    return path.parent if path.name == MANIFEST else path


def fresh_folder(path) -> Path:
    """An empty folder `<path>.part` to build something in; `finish_folder` gives it its name."""
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish_folder(path) -> None:
    """Put `<path>.part` in the place of `path`. Its manifest is the last thing to vanish and the first to come back."""
    path = Path(path)
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    os.replace(f"{path}.part", path)
