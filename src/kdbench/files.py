"""Files that are whole or absent, and manifests that say what a folder holds."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from kdbench.errors import UserError

MANIFEST = "manifest.json"
# bytes; larger files are compared by size alone when they are read: hashing 14 GB at every start is no check but a delay
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
    content = facts | {"kind": kind, "files": files}
    manifest = content | {"fingerprint": fingerprint(content)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder, kind: str) -> dict:
    """Read the manifest of a folder and check the files that it lists.

    Args:
        folder: the folder, or the path of its `manifest.json`.
        kind: what it must hold ("model", "records", "tokens", "alignment", "spelling", "vocabulary", "teacher cache").

    Raises:
        UserError: no manifest, another kind, a missing or changed file; says which and how to make it anew.
    """
    folder = folder_of(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no finished {kind} ({MANIFEST} is missing): run the rule that makes it")
    manifest = read_json(path)
    remedy = f"make it anew: snakemake --cores all --forcerun {path}"
    if not isinstance(manifest, dict) or not {"kind", "files", "fingerprint"} <= manifest.keys():
        raise UserError(f"{path} is no manifest; {remedy}")
    if manifest["kind"] != kind:
        raise UserError(f"{path} describes {manifest['kind']}, not {kind}: give another folder")
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} is missing; {remedy}")
        if file.stat().st_size != facts["bytes"]:
            raise UserError(f"{file} is damaged ({file.stat().st_size} bytes instead of {facts['bytes']}); {remedy}")
        if facts["bytes"] <= _HASHED_ON_READ and sha256(file) != facts["sha256"]:
            raise UserError(f"{file} is damaged (its sha256 is not that of {path}); {remedy}")
    return manifest


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
