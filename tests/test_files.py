import json
import os
import shutil

import pytest

from kdbench import files
from kdbench.errors import UserError


def make(folder, weights=b"abc" * 100, rows=3):
    """A finished folder of two files, one of them deeper."""
    part = files.fresh_folder(folder)
    (part / "deeper").mkdir()
    (part / "deeper/weights.bin").write_bytes(weights)
    files.write_text(part / "records.jsonl", "{}\n")
    manifest = files.write_manifest(part, "records", rows=rows)
    files.finish_folder(folder)
    return manifest


def test_text_is_written_as_it_is_and_makes_its_folder(tmp_path):
    files.write_text(tmp_path / "a/b/text", "ä\r\n\n\u2028x")
    assert (tmp_path / "a/b/text").read_bytes() == "ä\r\n\n\u2028x".encode()
    assert os.listdir(tmp_path / "a/b") == ["text"]


@pytest.mark.parametrize("when", ["while writing", "before the rename"])
def test_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch, when):
    path = tmp_path / "file"
    files.write_text(path, "before")

    def crash(*_):
        raise KeyboardInterrupt

    if when == "before the rename":
        monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises((KeyboardInterrupt, UnicodeEncodeError)):
        files.write_text(path, "after" * 10_000 + ("\ud800" if when == "while writing" else ""))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_json_has_one_spelling(tmp_path):
    files.write_json(tmp_path / "a", {"b": [1, 2.5, None], "a": "ü"})
    files.write_json(tmp_path / "b", {"a": "ü", "b": [1, 2.5, None]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert files.read_json(tmp_path / "a") == {"a": "ü", "b": [1, 2.5, None]}
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": "1"})


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is no JSON"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"y\.json is missing"):
        files.read_json(tmp_path / "y.json")


def test_manifest_lists_files_and_facts(tmp_path):
    manifest = make(tmp_path / "data")
    assert set(manifest["files"]) == {"deeper/weights.bin", "records.jsonl"}
    assert manifest["files"]["deeper/weights.bin"]["bytes"] == 300
    assert manifest["rows"] == 3
    assert files.read_manifest(tmp_path / "data", "records") == manifest
    assert files.read_manifest(tmp_path / "data/manifest.json", "records") == manifest
    assert not (tmp_path / "data.part").exists()


def test_fingerprint_follows_content_not_place_or_time(tmp_path):
    first = make(tmp_path / "data")
    second = make(tmp_path / "elsewhere/other")
    assert first["fingerprint"] == second["fingerprint"]
    assert (tmp_path / "data/manifest.json").read_bytes() == (tmp_path / "elsewhere/other/manifest.json").read_bytes()
    os.utime(tmp_path / "data/records.jsonl", (1, 1))
    assert files.write_manifest(tmp_path / "data", "records", rows=3) == first
    assert make(tmp_path / "data", rows=4)["fingerprint"] != first["fingerprint"]
    assert make(tmp_path / "data", weights=b"abd" * 100)["fingerprint"] != first["fingerprint"]


def missing(folder):
    (folder / "deeper/weights.bin").unlink()


def truncated(folder):
    os.truncate(folder / "deeper/weights.bin", 299)


def flipped(folder):
    content = bytearray((folder / "deeper/weights.bin").read_bytes())
    content[150] ^= 1
    (folder / "deeper/weights.bin").write_bytes(content)


def dangling(folder):
    missing(folder)
    os.symlink("nowhere", folder / "deeper/weights.bin")


@pytest.mark.parametrize(
    ("damage", "what"),
    [(missing, "is missing"), (truncated, "299 bytes instead of 300"), (flipped, "sha256"), (dangling, "is missing")],
)
def test_damage_is_found(tmp_path, damage, what):
    make(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(UserError, match=what) as told:
        files.read_manifest(tmp_path / "data", "records")
    assert f"{tmp_path}/data/deeper/weights.bin" in str(told.value)
    assert f"--forcerun {tmp_path}/data/manifest.json" in str(told.value)


def test_of_large_folders_the_small_files_are_hashed(tmp_path, monkeypatch):
    """Sizes are looked at in any case."""
    make(tmp_path / "data")
    flipped(tmp_path / "data")
    hashed, plain = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or plain(path))
    monkeypatch.setattr(files, "_HASHED_ON_READ", 302)  # bytes: 300 and 3 are one too many
    files.read_manifest(tmp_path / "data", "records")
    assert hashed == ["records.jsonl"]
    truncated(tmp_path / "data")
    with pytest.raises(UserError, match="299 bytes instead of 300"):
        files.read_manifest(tmp_path / "data", "records")


def test_other_kind_or_no_manifest(tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match="describes records, not model"):
        files.read_manifest(tmp_path / "data", "model")
    with pytest.raises(UserError, match=r"holds no finished records \(manifest.json is missing\)"):
        files.read_manifest(tmp_path / "elsewhere", "records")


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "records"}', "{"])
def test_manifest_that_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is no (manifest|JSON)"):
        files.read_manifest(tmp_path, "records")


def test_unfinished_folder_does_not_count_and_is_begun_anew(tmp_path):
    part = files.fresh_folder(tmp_path / "data")
    (part / "rubbish").write_text("of an attempt that was killed")
    with pytest.raises(UserError, match="holds no finished records"):
        files.read_manifest(tmp_path / "data", "records")
    assert set(make(tmp_path / "data")["files"]) == {"deeper/weights.bin", "records.jsonl"}


def test_replaced_folder_keeps_nothing_of_before(tmp_path):
    make(tmp_path / "data")
    (tmp_path / "data/old").write_text("old")
    make(tmp_path / "data")
    assert not (tmp_path / "data/old").exists()


def test_folder_is_never_finished_while_it_is_replaced(tmp_path, monkeypatch):
    """Killed while the old folder is removed, or before the new one has its name: nobody takes what is left for whole."""
    make(tmp_path / "data")
    part = files.fresh_folder(tmp_path / "data")
    (part / "records.jsonl").write_text("new\n")
    files.write_manifest(part, "records", rows=1)

    def crash(path, *_):
        (tmp_path / "data/deeper/weights.bin").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        files.finish_folder(tmp_path / "data")
    assert (tmp_path / "data/records.jsonl").exists()
    with pytest.raises(UserError, match="holds no finished records"):
        files.read_manifest(tmp_path / "data", "records")
    monkeypatch.undo()
    files.finish_folder(tmp_path / "data")
    assert files.read_manifest(tmp_path / "data", "records")["rows"] == 1


def test_large_files_are_compared_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_HASHED_ON_READ", 100)
    make(tmp_path / "data")
    flipped(tmp_path / "data")
    files.read_manifest(tmp_path / "data", "records")
    truncated(tmp_path / "data")
    with pytest.raises(UserError, match="299 bytes"):
        files.read_manifest(tmp_path / "data", "records")


def test_manifest_is_readable_by_people(tmp_path):
    make(tmp_path / "data")
    lines = (tmp_path / "data/manifest.json").read_text().splitlines()
    assert len(lines) > 8
    assert list(json.loads("".join(lines))) == ["files", "fingerprint", "kind", "rows"]
