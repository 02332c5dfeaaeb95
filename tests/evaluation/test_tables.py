"""From scores to tables: the arithmetic, what is refused, and the page."""

import itertools
import statistics
from pathlib import Path

import pytest

from kdbench import files
from kdbench.errors import UserError
from kdbench.evaluation import tables
from kdbench.evaluation.comparisons import Runs, compare

SETTINGS = {
    "decoding": {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "no_repeat_ngram_size": 6, "max_new_tokens": 256, "precision": "fp32"},
    "text": {"template": "alpaca", "max_prompt_tokens": 256, "max_tokens": 512},
}  # fmt: skip
DATASETS = ("dolly", "sinst")


def value(method: str, training: int, dataset: str, decode: int) -> float:
    """A score with digits that would show any mix-up."""
    base = {"teacher": 40.0, "sft": 20.0, "uld": 30.0, "dskd.reverse_kl": 25.0}[method]
    return base + 3.1 * DATASETS.index(dataset) + 1.7 * training + 0.013 * decode**1.5 + training * decode / 97


def write_scores(folder: Path, method: str, trainings, decodes, cut: int = 0) -> list[str]:
    """The scores.json files of a teacher (no training seeds) or of a method's students."""
    paths = []
    for training, dataset, decode in itertools.product(trainings or [None], DATASETS, decodes):
        part = "" if training is None else f"seed{training}/"
        path = folder / method / f"{part}evaluation/{dataset}/decode{decode}/scores.json"
        scores = {"rouge_l": value(method, training or 0, dataset, decode), "records": 500, "share_empty": 0.0}
        more = {"share_truncated": 0.25, "mean_tokens": 60.5, "prompts_cut": cut * (dataset == "sinst")}
        items = [{"id": f"r{i}", "rouge_l": (scores["rouge_l"] + by) / 100} for i, by in enumerate((-6, 2, 1, 3))]
        files.write_json(path, scores | more | {"items": items})
        paths.append(str(path))
    return paths


def shown(folder: Path, trainings=(1, 2, 3), decodes=(10, 20), methods=("sft", "uld", "dskd.reverse_kl")) -> list[dict]:
    """Rows of one experiment, with their long tables on disk."""
    common = {"experiment": "pair", "teacher": "big", "student": "small"}
    rows = []
    for name in ("teacher", *methods):
        seeds = () if name == "teacher" else trainings
        paths = {"scores": f"{folder}/{name}.csv", "items": f"{folder}/{name}_items.csv"}
        made = write_scores(folder, name, seeds, decodes, cut=7 if name == "uld" else 0)
        tables.write_csv(paths["scores"], tables.collect(made))
        tables.write_csv(paths["items"], tables.items(made))
        method, _, objective = name.partition(".")
        variant = "" if name == "teacher" else name
        rows.append(common | {"method": method, "objective": objective, "variant": variant} | paths)
    return rows


def summary(rows, scores=None):
    """The table of these rows, or of other scores in their place."""
    return tables.summarise(tables.join(rows) if scores is None else scores, Runs(rows))


def test_long_form(tmp_path):
    scores = tables.join(shown(tmp_path))
    assert list(scores.columns[:9]) == [*tables.KEYS, "training_seed", "dataset", "decode_seed"]
    assert len(scores) == 2 * 2 + 3 * (3 * 2 * 2)
    one = scores[(scores["variant"] == "uld") & (scores["training_seed"] == "2") & (scores["dataset"] == "sinst")]
    assert one["rouge_l"].tolist() == [
        value("uld", 2, "sinst", 10),
        value("uld", 2, "sinst", 20),
    ]  # bit for bit, through CSV
    teacher = scores[scores["method"] == "teacher"]
    assert set(teacher["student"]) == {""}
    assert set(teacher["training_seed"]) == {""}


def test_deviation_over_training_seeds(tmp_path):
    table = summary(shown(tmp_path))
    assert list(table.columns) == [
        "experiment", "method", "student", "teacher", "objective", "variant",
        "dolly", "dolly_std", "sinst", "sinst_std", "average",
        "dolly_low", "dolly_high", "sinst_low", "sinst_high", "average_low", "average_high",
        "training_seeds", "decode_seeds", "std_over", "interval_over",
    ]  # fmt: skip
    assert table["method"].tolist() == ["teacher", "sft", "uld", "dskd"]
    assert table["objective"].tolist() == ["", "", "", "reverse_kl"]
    uld = table.iloc[2]
    of_seeds = [statistics.mean(value("uld", seed, "sinst", decode) for decode in (10, 20)) for seed in (1, 2, 3)]
    assert uld["sinst"] == pytest.approx(statistics.mean(of_seeds), rel=1e-12)
    assert uld["sinst_std"] == pytest.approx(statistics.stdev(of_seeds), rel=1e-12)
    assert uld["average"] == pytest.approx((uld["dolly"] + uld["sinst"]) / 2, rel=1e-12)
    assert (uld["training_seeds"], uld["decode_seeds"], uld["std_over"]) == (3, 2, "training seeds")
    teacher = table.iloc[0]
    assert (teacher["student"], teacher["std_over"]) == ("", "decode seeds")
    of_decodes = [value("teacher", 0, "dolly", decode) for decode in (10, 20)]
    assert teacher["dolly_std"] == pytest.approx(statistics.stdev(of_decodes), rel=1e-12)


def test_deviation_over_decode_seeds_of_one_training(tmp_path):
    table = summary(shown(tmp_path, trainings=(1,), decodes=(10, 20, 30)))
    of_decodes = [value("sft", 1, "dolly", decode) for decode in (10, 20, 30)]
    assert table.iloc[1]["dolly_std"] == pytest.approx(statistics.stdev(of_decodes), rel=1e-12)
    assert set(table["std_over"]) == {"decode seeds"}


def test_no_deviation_of_one_value(tmp_path):
    rows = shown(tmp_path, trainings=(4,), decodes=(10,))
    table = summary(rows)
    assert table["dolly_std"].isna().all()
    assert set(table["std_over"]) == {""}
    tables.write_table(tmp_path / "table.csv", table)
    assert (tmp_path / "table.csv").read_text().splitlines()[2].startswith("pair,sft,small,big,,sft,27.62,,")


def test_files_are_the_same_bytes_whatever_the_order_of_the_score_files(tmp_path):
    written = []
    for run, order in (("a", 1), ("b", -1)):
        folder = tmp_path / run
        rows = shown(folder)
        tables.write_table(folder / "table.csv", summary(rows))
        paths = write_scores(folder, "uld", (1, 2, 3), (10, 20))
        tables.write_csv(folder / "uld.csv", tables.collect(paths[::order]))
        tables.write_table(folder / "again.csv", summary(rows))
        assert (folder / "table.csv").read_bytes() == (folder / "again.csv").read_bytes()
        written.append((folder / "table.csv").read_bytes())
    assert written[0] == written[1]
    assert b"\r" not in written[0]
    assert b"NaN" not in written[0]


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (lambda one: (one["training_seed"] == "2") & (one["dataset"] == "dolly") & (one["decode_seed"] == "20"),
         "uld: 0 scores instead of 1 for training seed 2, data set dolly, decode seed 20"),
        (lambda one: one["training_seed"] == "3", "training seed 3"),
        (lambda one: one["dataset"] == "sinst", "data set sinst"),
        (lambda one: one["decode_seed"] == "10", "decode seed 10"),
    ],
    ids=["one score", "a training seed", "a data set", "a decode seed"],
)  # fmt: skip
def test_what_is_missing_is_an_error(tmp_path, lost, told):
    rows = shown(tmp_path)
    scores = tables.join(rows)
    summary(rows, scores)
    with pytest.raises(UserError, match=told):
        summary(rows, scores[~((scores["variant"] == "uld") & lost(scores))])


def test_a_score_that_is_there_twice_is_an_error(tmp_path):
    import pandas as pd

    rows = shown(tmp_path)
    scores = tables.join(rows)
    with pytest.raises(UserError, match="2 scores instead of 1"):
        summary(rows, pd.concat([scores, scores.iloc[[9]]]))


def test_score_files_in_unknown_places_are_an_error(tmp_path):
    files.write_json(tmp_path / "scores.json", {})
    with pytest.raises(UserError, match=r"scores\.json does not lie in"):
        tables.collect([str(tmp_path / "scores.json")])


def test_a_missing_long_table_is_an_error(tmp_path):
    rows = shown(tmp_path)
    Path(rows[1]["scores"]).unlink()
    with pytest.raises(UserError, match=r"sft\.csv is missing"):
        tables.join(rows)


def page(rows, settings=SETTINGS, alignments=None) -> str:
    scores, runs = tables.join(rows), Runs(rows)
    table = tables.summarise(scores, runs)
    return tables.to_markdown(table, compare(runs), tables.notes(settings, alignments or {}, scores))


def test_page(tmp_path):
    text = page(
        shown(tmp_path), alignments={"results/alignments/small+big/train": {"quality": {"byte": 0.9, "index": 0.123}}}
    )
    lines = text.splitlines()
    assert "| method | dolly | sinst | average |" in lines
    first = lines[: lines.index("| difference to sft | dolly | sinst | average | gap closed |")]
    table = {line.split(" | ")[0].removeprefix("| "): line for line in first if line.startswith("| ")}
    assert list(table)[2:] == ["teacher", "sft", "uld", "dskd.reverse_kl"]
    assert table["uld"].count("**") == 6  # the best student of each column; the teacher is better and no student
    assert sum("**" in line for line in lines) == 1
    assert " ± " in table["teacher"]
    assert "± is the standard deviation over 3 training seeds" in text
    assert "for the teacher, over its 2 decode seeds" in text
    assert "sampling at temperature 1, top-p 0.9, without repeated 6-grams, in fp32, 256 tokens at most" in text
    assert "`alpaca` of 256 tokens" in text
    assert "shortened: 7 of 500 of `sinst` for small." in text
    assert "`small+big/train`: 90.0% of" in text
    assert "12.3% would" in text


def test_page_says_what_the_spread_is_over(tmp_path):
    assert "2 decode seeds of one training run" in page(shown(tmp_path / "a", trainings=(1,)))
    single = page(shown(tmp_path / "b", trainings=(1,), decodes=(10,)))
    assert "over the records of one training run: no interval for training variance" in single
    differences = single[single.index("difference to sft") :]
    assert "*" not in differences.split("Gap closed")[0]
    assert "cannot tell a method's gain from chance" in single
    assert "±" not in single
    greedy = SETTINGS | {"decoding": SETTINGS["decoding"] | {"temperature": 0.0, "no_repeat_ngram_size": 0}}
    assert "generated greedily, in fp32" in page(shown(tmp_path / "c"), greedy)


def test_scores_that_look_alike_are_both_best(tmp_path):
    rows = shown(tmp_path, trainings=(1,), decodes=(10,), methods=("sft", "uld"))
    scores = tables.join(rows)
    scores.loc[scores["method"] == "uld", "rouge_l"] = 30.001
    scores.loc[scores["method"] == "sft", "rouge_l"] = 30.004
    assert tables.to_markdown(summary(rows, scores), compare(Runs(rows)), []).count("**30.00**") == 6


def test_one_table_for_each_experiment(tmp_path):
    rows = shown(tmp_path)
    text = page(rows + [row | {"experiment": "other", "student": "tiny"} for row in rows[:2]])
    assert text.index("## pair") < text.index("Teacher big, student small.") < text.index("## other")
    assert "Teacher big, student tiny." in text


def test_the_table_of_one_method_has_no_teacher(tmp_path):
    text = page(shown(tmp_path)[2:3])
    assert "teacher |" not in text
    assert "**" in text
