"""What a table claims: the interval of each score, and the differences between methods, record by record and seed by seed."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdbench.errors import UserError
from kdbench.evaluation import statistics

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "experiment",
    "method",
    "against",
    "reference",
    "dataset",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "gap_closed",
    "training_seeds",
]
AVERAGE = "average"  # stands for a data set where the mean over all of them is meant

Scores = dict[str, np.ndarray]  # by data set, (training seeds, records), 0 to 100


class Runs:
    """The scores of all models of a table, record by record."""

    def __init__(self, shown: Sequence[dict]):
        """Read them.

        Args:
            shown: rows of the table, see `tables.join`; `items` is the path of a table of `tables.items`.

        Raises:
            UserError: such a table is missing, or models of one experiment did not answer the same records.
        """
        read = {path: _read(path) for path in dict.fromkeys(row["items"] for row in shown)}
        for experiment in dict.fromkeys(row["experiment"] for row in shown):
            _check_records([row["items"] for row in shown if row["experiment"] == experiment], read)
        order = (
            list(read[shown[0]["items"]]) if shown else []
        )  # one for all, for the data sets of two models are paired
        scores = {
            path: {name: tables[name].to_numpy() for name in sorted(tables, key=order.index)}
            for path, tables in read.items()
        }
        self._rows = [(row, scores[row["items"]]) for row in shown]

    def of(self, experiment: str) -> dict[str, Scores]:
        """Those of all models of an experiment, by name, in the order of the table."""
        return {name_of(row): scores for row, scores in self._rows if row["experiment"] == experiment}

    @property
    def experiments(self) -> list[str]:
        return list(dict.fromkeys(row["experiment"] for row, _ in self._rows))


def name_of(row) -> str:
    """What a row of a table is called: its variant, or `teacher`."""
    return row["variant"] or row["method"]


def estimate(scores: Scores, dataset: str) -> statistics.Estimate:
    """Mean and interval on a data set, or of the average."""
    return statistics.mean(_tables(scores, dataset))


def compare(runs: Runs):
    """Every student against its SFT and against the best of the other students.

    The difference is taken record by record between trainings of the same seed. P-values are corrected by Holm's method over the methods
    of an experiment, for each data set and kind of reference by itself.

    Returns:
        A frame with `COLUMNS`: `against` is `sft` or `best other`, `reference` the name of that one; the interval is of 95 %;
        `gap_closed` is the share of the way from SFT to the teacher, for differences to SFT where the teacher is ahead.
    """
    import pandas as pd

    rows = []
    for experiment in runs.experiments:
        models = runs.of(experiment)
        teacher = models.pop("teacher", None)
        for dataset in [*next(iter(models.values())), AVERAGE] if models else []:
            means = {name: estimate(scores, dataset).mean for name, scores in models.items()}
            for against, reference_of in (("sft", _sft), ("best other", _best_other)):
                found = []
                for name, scores in models.items():
                    reference = reference_of(name, means)
                    if reference is None:
                        continue
                    difference = _difference(scores, models[reference], dataset)
                    low, high = difference.interval()
                    row = dict.fromkeys(COLUMNS, math.nan) | {
                        "experiment": experiment,
                        "method": name,
                        "against": against,
                        "reference": reference,
                        "dataset": dataset,
                        "difference": difference.mean,
                        "low": low,
                        "high": high,
                        "p": difference.p_value(),
                        "training_seeds": difference.seeds,
                    }
                    if against == "sft" and teacher is not None:
                        gap = estimate(teacher, dataset).mean - means[reference]
                        row["gap_closed"] = difference.mean / gap if gap > 0 else math.nan
                    found.append(row)
                for row, p in zip(found, statistics.holm([row["p"] for row in found]), strict=True):
                    rows.append(row | {"p_holm": p})
    return pd.DataFrame(rows, columns=COLUMNS)


def _sft(name: str, means: dict[str, float]) -> str | None:
    return "sft" if "sft" in means and name != "sft" else None


def _best_other(name: str, means: dict[str, float]) -> str | None:
    return max((other for other in means if other != name), key=means.get, default=None)


def _difference(scores: Scores, reference: Scores, dataset: str) -> statistics.Estimate:
    pairs = zip(_tables(scores, dataset), _tables(reference, dataset), strict=True)
    return statistics.mean([ours - theirs for ours, theirs in pairs], paired=True)


def _tables(scores: Scores, dataset: str) -> list[np.ndarray]:
    return list(scores.values()) if dataset == AVERAGE else [scores[dataset]]


def _read(path: str) -> "dict[str, pd.DataFrame]":
    """For each data set a table with the training seeds as rows and the records, in order of their ids, as columns."""
    import pandas as pd

    types = {"training_seed": "string", "dataset": "string", "id": "string"}
    try:
        frame = pd.read_csv(path, dtype=types, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the rule `collect_scores`") from None
    tables = {
        dataset: rows.pivot(index="training_seed", columns="id", values="rouge_l")
        for dataset, rows in frame.groupby("dataset", sort=False)
    }
    for dataset, table in tables.items():
        if table.isna().to_numpy().any():
            raise UserError(f"{path}: the trainings have not answered the same records of data set {dataset}")
    return tables


def _check_records(paths: Sequence[str], read: "dict[str, dict[str, pd.DataFrame]]") -> None:
    first = read[paths[0]]
    for path in paths[1:]:
        for dataset in {**first, **read[path]}:
            one, other = first.get(dataset), read[path].get(dataset)
            if one is None or other is None or not one.columns.equals(other.columns):
                raise UserError(f"{path} and {paths[0]} are not of the same records of data set {dataset}")
