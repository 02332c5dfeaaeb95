"""The file of answers gives back what was written, or says which line is damaged."""

import json
import subprocess
import sys

import pytest

from kdbench.errors import UserError
from kdbench.evaluation import predictions
from kdbench.evaluation.predictions import Prediction

PLAIN = Prediction("set/1", "Name it.", False, "two rivers", ["a river", "two"], 4, "eos")
HARD = Prediction("set/2", "a\nb", True, 'quote " back \\ line\u2028 \n\ttab \x00 \r 😀 \ufffd', [""], 256, "length")
MADE_FROM = {"model": "m", "records": "r", "settings": {"decoding": {"top_p": 1.0}}, "seed": 10}


def test_round_trip(tmp_path):
    path = tmp_path / "decode10" / "predictions.jsonl"
    predictions.write(path, [PLAIN, HARD], MADE_FROM)
    assert predictions.read(path) == [PLAIN, HARD]
    assert len(path.read_bytes().splitlines()) == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["identity.json", "predictions.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "set/2", "prompt": "x", "pred',
        b"[1]",
        b"",
        json.dumps({"id": "set/2"}).encode(),
        json.dumps({"halt": "eos"}).encode(),
        b'{"id": "\xff"}',
    ],
)
def test_damaged_lines_are_told(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    predictions.write(path, [PLAIN], MADE_FROM)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: no prediction") as told:
        predictions.read(path)
    assert "\n" not in str(told.value)


def test_answers_are_known_by_what_they_were_made_from(tmp_path):
    path = tmp_path / "predictions.jsonl"
    assert not predictions.is_made_from(path, MADE_FROM)
    predictions.write(path, [PLAIN], MADE_FROM)
    assert predictions.is_made_from(path, json.loads(json.dumps(MADE_FROM)))
    for key, other in (("model", "n"), ("records", "s"), ("settings", {}), ("seed", 20)):
        assert not predictions.is_made_from(path, MADE_FROM | {key: other})
    path.write_bytes(path.read_bytes() + b" ")
    assert not predictions.is_made_from(path, MADE_FROM)
    path.unlink()
    assert not predictions.is_made_from(path, MADE_FROM)


def test_missing_and_empty_files(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(UserError, match="is missing: run the rule `generate`"):
        predictions.read(path)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        predictions.read(path)


def test_scoring_does_not_wait_for_torch():
    script = (
        "import sys; import kdbench.evaluation.predictions, kdbench.evaluation.rouge; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
