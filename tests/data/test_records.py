import gzip
import json
import unicodedata

import pytest

from kdbench import files
from kdbench.data import records
from kdbench.data.records import Record
from kdbench.errors import UserError
from kdbench.settings import EmbeddedData, FileData

GOOD = {"instruction": "Say yes.", "output": "Yes."}


def jsonl(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_fields(tmp_path):
    path = jsonl(
        tmp_path / "some.jsonl",
        {"instruction": "Add.", "input": "1 2", "prompt": "in a template", "output": "3", "topic": "sums", "score": 4},
        {"instruction": "Name one.", "output": ["a", "b"], "category": "names", "input": None},
        {"prompt": "Once upon a time\n", "output": "there was."},
    )
    assert records.read_jsonl(path) == [
        Record("some/1", "Add.", "1 2", None, ("3",), "sums"),
        Record("some/2", "Name one.", "", None, ("a", "b"), "names"),
        Record("some/3", "", "", "Once upon a time\n", ("there was.",), ""),
    ]


def test_ids_are_lines_of_the_file(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD, b"", b"  ", GOOD)
    assert [record.id for record in records.read_jsonl(path, name="mine")] == ["mine/1", "mine/4"]


def test_first_rows_only_and_later_ones_are_not_looked_at(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD, GOOD, b"no JSON")
    assert len(records.read_jsonl(path, rows=2)) == 2


def test_gzip(tmp_path):
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert records.read_jsonl(path)[0].id == "set/1"


def test_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert records.read_jsonl(path)[0].outputs == ("Yes.",)


def test_texts_are_brought_to_nfc_and_outputs_stripped(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Việt")
    path = jsonl(
        tmp_path / "x.jsonl",
        {"instruction": f"  {decomposed} ", "input": decomposed, "output": [f"\n{decomposed}\u00a0", "b"]},
        {"prompt": f" {decomposed}", "output": "c"},
        GOOD,
    )
    first, second, third = records.read_jsonl(path)
    assert (first.instruction, first.input, first.outputs) == ("  Việt ", "Việt", ("Việt", "b"))
    assert second.prompt == "Việt"
    records.prepare(FileData(source="file", path=str(path)), "x", tmp_path / "out")
    assert files.read_manifest(tmp_path / "out", "records")["normalised"] == 2
    assert third.outputs == ("Yes.",)


BAD = {
    "no JSON": (b"{'instruction': 1}", "the row is no JSON"),
    "half a row": (b'{"instruction": "a", "out', "the row is no JSON"),
    "not UTF-8": (b'{"instruction": "caf\xe9", "output": "b"}', "the row is not UTF-8 (byte 21 of the line)"),
    "a list": ([GOOD], "the row is a list"),
    "a text": ("text", "the row is a text"),
    "null": (None, "the row is null"),
    "no instruction": ({"output": "b"}, "field 'instruction': missing; the row has: output"),
    "no output": ({"instruction": "a", "response": "b"}, "field 'output': missing; the row has: instruction, response"),
    "no fields": ({}, "field 'instruction': missing; the row has: no fields"),
    "instruction a number": (GOOD | {"instruction": 7}, "field 'instruction': a number; a text is expected"),
    "instruction null": (GOOD | {"instruction": None}, "field 'instruction': null; a text is expected"),
    "instruction blank": (GOOD | {"instruction": " \n"}, "field 'instruction': empty"),
    "prompt empty": ({"prompt": "", "output": "b"}, "field 'prompt': empty"),
    "input a list": (GOOD | {"input": ["a"]}, "field 'input': a list; a text is expected"),
    "output empty": (GOOD | {"output": ""}, "field 'output': empty"),
    "output blank": (GOOD | {"output": " \t\n"}, "field 'output': empty"),
    "output null": (GOOD | {"output": None}, "field 'output': null; a text or a list of texts is expected"),
    "output true": (GOOD | {"output": True}, "field 'output': true or false; a text or a list of texts is expected"),
    "output an object": (GOOD | {"output": {}}, "field 'output': an object; a text or a list of texts is expected"),
    "no outputs": (GOOD | {"output": []}, "field 'output': an empty list"),
    "one output empty": (GOOD | {"output": ["a", ""]}, "field 'output[1]': empty"),
    "one output a number": (GOOD | {"output": ["a", 2]}, "field 'output[1]': a number; a text is expected"),
    "NUL": (GOOD | {"input": "a\0b"}, "field 'input': holds a NUL character"),
    "half a surrogate pair": (GOOD | {"output": "a\ud83d"}, "field 'output': holds half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, kind):
    row, message = BAD[kind]
    path = jsonl(tmp_path / "x.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError) as error:
        records.read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


def test_ten_bad_rows_are_shown_and_the_others_counted(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *[{"instruction": "a"}] * 13, GOOD)
    with pytest.raises(UserError) as error:
        records.read_jsonl(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{path}:{row}" for row in range(1, 11)]
    assert lines[10:] == ["... and 3 more"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="the file is empty"):
        records.read_jsonl(tmp_path / "x.jsonl")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        records.read_jsonl(tmp_path / "none.jsonl")


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 100)
    for name, content in {
        "short": whole[:-12],
        "none": b"no gzip",
        "garbled": whole[:15] + b"\xff" * 20 + whole[35:],
    }.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be decompressed"):
            records.read_jsonl(tmp_path / f"{name}.jsonl.gz")


def test_write_and_load(tmp_path):
    some = [
        Record("x/1", "in\u2028struction", "", None, ("a", "b\nc"), "kind"),
        Record("x/2", "", "", "prompt 👍🏽", ("é",)),
    ]
    records.write(tmp_path / "out", some, teacher="t")
    assert records.load(tmp_path / "out") == records.load(tmp_path / "out" / "manifest.json") == some
    manifest = files.read_manifest(tmp_path / "out", "records")
    assert (manifest["rows"], manifest["teacher"]) == (2, "t")
    with open(tmp_path / "out" / "records.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="damaged"):
        records.load(tmp_path / "out")


def test_prepare_from_the_embedded_world(tmp_path):
    settings = EmbeddedData(source="embedded", split="dev", rows=7)
    records.prepare(settings, "mine", tmp_path / "a")
    records.prepare(settings, "mine", tmp_path / "b")
    found = records.load(tmp_path / "a")
    assert [record.id for record in found] == [f"mine/{row}" for row in range(1, 8)]
    manifests = [files.read_manifest(tmp_path / name, "records") for name in "ab"]
    assert manifests[0] == manifests[1]


def test_prepare_leaves_nothing_of_a_bad_file(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD, {"instruction": "a"})
    with pytest.raises(UserError):
        records.prepare(FileData(source="file", path=str(path)), "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
