"""Differences between methods: by hand, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdbench.errors import UserError
from kdbench.evaluation import comparisons, statistics, tables
from kdbench.evaluation.comparisons import COLUMNS, Runs

SIZES = {"dolly": 40, "vicuna": 15}


def written(folder, name, seeds=(1, 2, 3), better=0.0, noise=4.0, sizes=SIZES, experiment="pair") -> dict:
    """A row of a table whose scores are those of the records, the same for all methods, and noise of their own."""
    generator = np.random.default_rng(sum(map(ord, name)))
    rows = [
        (seed, dataset, f"{dataset}{i}", 50 + i % 7 + better + noise * generator.standard_normal())
        for seed in seeds
        for dataset, size in sizes.items()
        for i in range(size)
    ]
    generator.shuffle(rows)  # the order of a file means nothing
    path = folder / f"{name}.csv"
    tables.write_csv(path, pd.DataFrame(rows, columns=["training_seed", "dataset", "id", "rouge_l"]))
    student = name != "teacher"
    variant = name if student else ""
    return {"experiment": experiment, "method": name.split(".")[0], "variant": variant, "items": str(path)}


def by_hand(row, dataset) -> np.ndarray:
    """(S, I)"""
    frame = pd.read_csv(row["items"])
    frame = frame[frame["dataset"] == dataset].sort_values(["training_seed", "id"])
    return frame["rouge_l"].to_numpy().reshape(frame["training_seed"].nunique(), -1)


def test_differences_are_paired_by_record_and_seed(tmp_path):
    rows = [written(tmp_path, name, better=by) for name, by in (("sft", 0), ("uld", 3), ("dskd.reverse_kl", 1))]
    found = comparisons.compare(Runs(rows))
    assert list(found.columns) == COLUMNS
    assert len(found) == 3 * (2 + 3)  # sft is not compared with itself, but with the best other
    one = found.query("method == 'uld' and against == 'sft' and dataset == 'dolly'").iloc[0]
    difference = by_hand(rows[1], "dolly") - by_hand(rows[0], "dolly")
    assert one["difference"] == pytest.approx(difference.mean())
    want = statistics.mean([difference], paired=True)
    assert (one["low"], one["high"]) == pytest.approx(want.interval())
    assert one["p"] == pytest.approx(want.p_value())
    assert one["training_seeds"] == 3
    family = found.query("against == 'sft' and dataset == 'dolly'")
    assert family["p_holm"].tolist() == pytest.approx(statistics.holm(family["p"].tolist()))


def test_the_average_is_over_data_sets(tmp_path):
    rows = [written(tmp_path, "sft"), written(tmp_path, "uld", better=2)]
    found = comparisons.compare(Runs(rows)).query("method == 'uld' and against == 'sft'").set_index("dataset")
    assert found.loc["average", "difference"] == pytest.approx(found.loc[list(SIZES), "difference"].mean())


def test_one_training_is_a_paired_t_test_over_records(tmp_path):
    rows = [written(tmp_path, "sft", seeds=(5,)), written(tmp_path, "uld", seeds=(5,), better=1)]
    found = comparisons.compare(Runs(rows)).query("method == 'uld' and against == 'sft' and dataset == 'dolly'")
    want = stats.ttest_rel(by_hand(rows[1], "dolly")[0], by_hand(rows[0], "dolly")[0])
    assert found["p"].item() == pytest.approx(want.pvalue)
    assert (found["low"].item(), found["high"].item()) == pytest.approx(tuple(want.confidence_interval()))


def test_the_best_other_is_the_best_of_each_data_set(tmp_path):
    rows = [written(tmp_path, name, better=by, noise=0.1) for name, by in (("sft", 0), ("uld", 3), ("mined", 5))]
    found = comparisons.compare(Runs(rows)).query("against == 'best other' and dataset == 'vicuna'")
    assert dict(zip(found["method"], found["reference"], strict=True)) == {
        "sft": "mined",
        "uld": "mined",
        "mined": "uld",
    }


def test_gap_closed_is_the_share_of_the_way_to_the_teacher(tmp_path):
    rows = [
        written(tmp_path, name, seeds=seeds, better=by, noise=0)
        for name, seeds, by in (("teacher", ("",), 10), ("sft", (1, 2), 0), ("uld", (1, 2), 4), ("mined", (1, 2), -1))
    ]
    found = comparisons.compare(Runs(rows)).query("dataset == 'average'").set_index(["against", "method"])["gap_closed"]
    assert found["sft", "uld"] == pytest.approx(0.4)
    assert found["sft", "mined"] == pytest.approx(-0.1)
    assert found["best other"].isna().all()
    assert "teacher" not in found["sft"].index
    behind = [rows[0], written(tmp_path, "sft", seeds=(1, 2), better=11, noise=0), rows[2]]
    assert comparisons.compare(Runs(behind))["gap_closed"].isna().all()


def test_experiments_are_kept_apart(tmp_path):
    (tmp_path / "b").mkdir()
    rows = [written(tmp_path, "sft"), written(tmp_path, "uld")]
    rows += [written(tmp_path / "b", name, experiment="other") for name in ("uld", "mined")]
    found = comparisons.compare(Runs(rows))
    assert set(found[found["experiment"] == "other"]["against"]) == {"best other"}  # it has no sft
    assert set(found[found["experiment"] == "pair"]["against"]) == {"sft", "best other"}


def test_nothing_to_compare(tmp_path):
    assert comparisons.compare(Runs([written(tmp_path, "uld")])).empty
    assert comparisons.compare(Runs([written(tmp_path, "teacher", seeds=("",))])).empty


def test_other_records_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"uld\.csv and .*sft\.csv are not of the same records of data set vicuna"):
        Runs([written(tmp_path, "sft"), written(tmp_path, "uld", sizes=SIZES | {"vicuna": 16})])
    with pytest.raises(UserError, match="data set vicuna"):
        Runs([written(tmp_path, "sft"), written(tmp_path, "uld", sizes={"dolly": 40})])
    row = written(tmp_path, "sft")
    frame = pd.read_csv(row["items"])
    frame.iloc[1:].to_csv(row["items"], index=False)
    with pytest.raises(UserError, match=r"sft\.csv: the trainings have not answered the same records"):
        Runs([row])
    (tmp_path / "sft.csv").unlink()
    with pytest.raises(UserError, match=r"sft\.csv is missing: run the rule `collect_scores`"):
        Runs([row])
