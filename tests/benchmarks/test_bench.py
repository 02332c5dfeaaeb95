"""The benchmark's command on tiny models, and what it makes of its figures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import bench, floor, results, rows
from benchmarks.shapes import TINY
from kdbench.data import batches
from kdbench.errors import UserError
from kdbench.methods import names
from tests import tiny
from tests.shared import ROOT


def figures(seconds=1.0, peak=1.0, spread=0.1) -> dict:
    return {
        "seconds": seconds, "seconds_min": seconds - spread, "seconds_max": seconds + spread, "cpu_seconds": seconds,
        "peak_gb": peak, "steps": [seconds], "tokens_per_second": 1 / seconds, "loading_gb": 0.5,
    }  # fmt: skip


def run_of(floor=10.0, **seconds) -> dict:
    """A run whose methods, live and cached, take so many seconds."""
    found = {"setup": {"shapes": "full"}, "floor": figures(floor)}
    found["methods"] = {name: {"live": figures(of), "cached": figures(of)} for name, of in seconds.items()}
    results.complete(found)
    return found


@pytest.mark.slow
def test_the_command_measures_steps_of_real_trainings(tmp_path):
    command = [sys.executable, "-m", "benchmarks.bench", "--only", "sft,uld", "--shapes", "tiny", "--steps", "3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["threads"] == 1
    assert len(found["floor"]["steps"]) == 6  # before and after
    assert found["methods"].keys() == {"sft", "uld"}
    for sources in found["methods"].values():
        for of in (sources["live"], sources["cached"]):
            assert of["seconds_min"] <= of["seconds"] <= of["seconds_max"]
            assert of["ratio_to_floor"] == pytest.approx(of["seconds"] / found["floor"]["seconds"])
            assert of["ratio_to_sft"] == pytest.approx(of["seconds"] / found["methods"]["sft"]["live"]["seconds"])
            assert of["peak_gb"] >= of["loading_gb"] > 0
            assert of["split"].keys() == set(results.PARTS)
    live, cached = found["methods"]["uld"]["live"]["split"], found["methods"]["uld"]["cached"]["split"]
    never = {"optimal_transport"}
    assert all(live[part] > 0 for part in set(results.PARTS) - never)
    assert all(live[part] == 0 for part in never)
    assert cached["teacher_body"] < live["teacher_body"]
    assert "| uld | cached |" in (tmp_path / "bench.md").read_text()


def test_every_method_but_those_that_train_like_sft_is_measured():
    assert set(names()) - set(bench.measured_methods(None)) == {"seqkd"}
    assert set(results.CEILINGS) <= set(bench.measured_methods(None))
    assert bench.measured_methods(["dskd"]) == {"dskd": {"pair": "same", "sources": ["live", "cached"]}}
    with pytest.raises(UserError, match="'dskdd' is not a method; did you mean 'dskd'"):
        bench.measured_methods(["dskdd"])


def test_a_missed_ceiling_is_named():
    assert results.missed(run_of(sft=3.4, uld=19.0, alm=90.0)) == []
    found = run_of(sft=3.6, uld=19.0)
    found["methods"]["uld"]["live"]["peak_gb"] = 3.01
    time, memory = results.missed(found)
    assert time.startswith("sft: a step takes 0.36 of the floor's time, the ceiling is 0.35")
    assert memory == "uld: peak memory is 3.01 GB, the ceiling is 3.0 GB"


def test_slower_is_what_no_spread_of_steps_explains():
    before = run_of(floor=10.0, sft=3.0)
    assert results.slower(run_of(floor=10.0, sft=3.2), before) == []  # 3.1 to 3.3 after 2.9 to 3.1
    assert results.slower(run_of(floor=20.0, sft=6.0), before) == []  # a slower machine
    line, _ = results.slower(run_of(floor=10.0, sft=3.5), before)
    assert line == "sft, teacher live: 0.35 of the floor's time, before 0.30"
    other = run_of(sft=9.0) | {"setup": {"shapes": "tiny"}}
    assert results.slower(other, before) == []
    larger = run_of(sft=3.0)
    larger["methods"]["sft"]["cached"]["peak_gb"] = 1.1
    assert results.slower(larger, before) == ["sft, teacher cached: 1.10 GB, before 1.00 GB"]


def test_steps_repeat_one_typical_batch():
    column = tiny.tokens(40, lengths=[(3, count) for count in range(1, 31)])
    chosen = rows.typical(column, 4)
    assert abs(column.response_counts[chosen].mean() - column.response_counts.mean()) < 1
    made = rows.repeated(chosen, 5)
    steps = batches.schedule(len(made), 4, 0, rows.SEED)
    assert [[made[row] for row in step] for step in steps] == [chosen] * 5


def test_generated_records_are_as_long_as_dolly_records():
    words = [len(record.outputs[0].split()) for record in rows.generated(400)]
    assert abs(np.median(words) - rows._SAID[5]) < 6
    assert not rows.is_real(TINY)


def test_the_floor_learns_responses_alone():
    ids, mask, labels = floor.padded([np.array([5, 6, 7]), np.array([8, 9])], [2, 1], 4)
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, -100], [-100, 9, -100, -100]]
    model = tiny.gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            torch.stack([model(torch.tensor([[5, 6]])).logits[0, 1], model(torch.tensor([[8]])).logits[0, 0]]),
            torch.tensor([7, 9]),
        )
    losses = [floor.training_step(model, optimizer, (ids, mask, labels)) for _ in range(5)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]
