"""From scores to the table: long form, summary, and a page to read. Pure functions on data frames, and their files."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError
from kdbench.evaluation.comparisons import AVERAGE, Runs, estimate, name_of

KEYS = ["experiment", "method", "student", "teacher", "objective", "variant"]
_RUN = re.compile(
    r"(?:/seed(?P<training_seed>\d+))?/evaluation/(?P<dataset>[^/]+)/decode(?P<decode_seed>\d+)/scores\.json$"
)
_MEASURES = ["rouge_l", "records", "share_truncated", "share_empty", "mean_tokens", "prompts_cut"]


def collect(score_files: Sequence[str]):
    """One model's scores, or those of the students of one method, as a long table.

    Args:
        score_files: `[.../seed<n>]/evaluation/<data set>/decode<n>/scores.json`; folders without a seed belong to a teacher.

    Returns:
        A frame with `training_seed` (empty for a teacher), `dataset`, `decode_seed`, and the measures of `rouge.score`.
    """
    import pandas as pd

    rows = []
    for path in score_files:
        scores = files.read_json(path)
        rows.append(_where(path) | {key: scores[key] for key in _MEASURES})
    return pd.DataFrame(rows)


def _where(path: str) -> dict[str, str]:
    """Training seed (empty for a teacher), data set and decode seed, from a path."""
    found = _RUN.search(Path(path).as_posix())
    if found is None:
        raise UserError(f"{path} does not lie in a folder evaluation/<data set>/decode<seed>")
    return {key: value or "" for key, value in found.groupdict().items()}


def items(score_files: Sequence[str]):
    """The ROUGE-L of each record, averaged over decode seeds, as a long table.

    Args:
        score_files: see `collect`.

    Returns:
        A frame with `training_seed` (empty for a teacher), `dataset`, `id` of the record, and `rouge_l` from 0 to 100.
    """
    import pandas as pd

    rows = []
    for path in score_files:
        where = _where(path)
        for item in files.read_json(path)["items"]:
            rows.append((where["training_seed"], where["dataset"], item["id"], 100 * item["rouge_l"]))
    frame = pd.DataFrame(rows, columns=["training_seed", "dataset", "id", "rouge_l"])
    return frame.groupby(["training_seed", "dataset", "id"], sort=False)["rouge_l"].mean().reset_index()


def join(shown: Sequence[dict]):
    """The long table of everything that a table shows.

    Args:
        shown: rows of the table to be, in order: `experiment`, `method`, `student`, `teacher`, `objective`, `variant`, and `scores`, the
            path of a long table of `collect`.

    Raises:
        UserError: such a table is missing.
    """
    import pandas as pd

    frames = []
    for row in shown:
        try:
            frame = pd.read_csv(
                row["scores"],
                dtype={"training_seed": "string", "decode_seed": "string", "dataset": "string"},
                keep_default_na=False,
            )
        except FileNotFoundError:
            raise UserError(f"{row['scores']} is missing: run the rule `collect_scores`") from None
        named = {key: row[key] for key in KEYS} | ({"student": ""} if row["method"] == "teacher" else {})
        frames.append(frame.assign(**named)[[*KEYS, *frame.columns]])
    return pd.concat(frames, ignore_index=True)


def summarise(scores, runs: Runs):
    """The table: a row for each experiment, model, method and objective.

    For each data set its mean and standard deviation (n - 1): over training seeds, each averaged over its decode seeds, where there are
    several; else over decode seeds; else empty. `std_over` says which. `average` is the mean over data sets. `<data set>_low` and
    `_high` are the ends of the 95 % interval; `interval_over` says what it allows for: records, and training seeds where there are
    several.

    Args:
        scores: long table of `join`.
        runs: the same scores record by record.

    Raises:
        UserError: a combination of training seed, data set and decode seed is missing or there twice, or rows differ in theirs.
    """
    import pandas as pd

    datasets = list(dict.fromkeys(scores["dataset"]))
    seeds_of: dict[str, set] = {}
    rows = []
    for key, group in scores.groupby(KEYS, sort=False, dropna=False):
        row = dict(zip(KEYS, key, strict=True))
        trained = set(group["training_seed"])
        same = trained if row["method"] == "teacher" else seeds_of.setdefault(row["experiment"], trained)
        _check_complete(row, group, datasets, sorted(set(scores["decode_seed"])), sorted(trained | same))
        means = group.groupby(["dataset", "training_seed"])["rouge_l"].mean()
        decodes = group["decode_seed"].nunique()
        for dataset in datasets:
            row[dataset] = means[dataset].mean()
            values = means[dataset] if len(trained) > 1 else group.loc[group["dataset"] == dataset, "rouge_l"]
            row[f"{dataset}_std"] = values.std()
        row["average"] = sum(row[dataset] for dataset in datasets) / len(datasets)
        items = runs.of(row["experiment"])[name_of(row)]
        for dataset in [*datasets, AVERAGE]:
            row[f"{dataset}_low"], row[f"{dataset}_high"] = estimate(items, dataset).interval()
        over = "training seeds" if len(trained) > 1 else "decode seeds" if decodes > 1 else ""
        counted = {"training_seeds": len(trained), "decode_seeds": decodes, "std_over": over}
        rows.append(row | counted | {"interval_over": "training seeds and records" if len(trained) > 1 else "records"})
    return pd.DataFrame(rows)


def _check_complete(row: dict, group, datasets, decode_seeds, training_seeds) -> None:
    """Every data set, decode seed and training seed with every other, once."""
    found = Counter(zip(group["training_seed"], group["dataset"], group["decode_seed"], strict=True))
    for training, dataset, decode in itertools.product(training_seeds, datasets, decode_seeds):
        count = found[training, dataset, decode]
        if count != 1:
            of = f"{row['experiment']}, {row['variant'] or row['method']}"
            seed = f"training seed {training}, " if training else ""
            raise UserError(f"{of}: {count} scores instead of 1 for {seed}data set {dataset}, decode seed {decode}")


def write_csv(path, frame) -> None:
    """CSV in full precision, all or nothing."""
    files.write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def write_table(path, table) -> None:
    """The summary as CSV, scores with two decimals."""
    files.write_text(path, table.to_csv(index=False, float_format="%.2f", lineterminator="\n"))


def notes(settings: dict, alignments: dict[str, dict], scores) -> list[str]:
    """What a reader has to know of the numbers.

    Args:
        settings: `decoding` and `text`.
        alignments: folder -> manifest of the alignment of each pair of models.
        scores: long table of `join`.
    """
    decoding, text = settings["decoding"], settings["text"]
    how = "greedily"
    if decoding["temperature"] > 0:
        how = f"by sampling at temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
        how += f", top-k {decoding['top_k']}" if decoding["top_k"] else ""
    if decoding["no_repeat_ngram_size"]:
        how += f", without repeated {decoding['no_repeat_ngram_size']}-grams"
    lines = [
        "Scores are ROUGE-L F1, 0 to 100, the maximum over the references, averaged over the records.",
        f"Answers were generated {how}, in {decoding['precision']}, {decoding['max_new_tokens']} tokens at most, to prompts of the template"
        f" `{text['template']}` of {text['max_prompt_tokens']} tokens at most.",
        _prompts_cut(scores),
    ]
    for folder, manifest in alignments.items():
        quality = manifest["quality"]
        lines.append(
            f"Tokens of `{'/'.join(Path(folder).parts[-2:])}`: {quality['byte']:.1%} of the student's response tokens cover the same bytes"
            f" as one of the teacher's; by index alone {quality['index']:.1%} would be paired with the same bytes."
        )
    return lines


def _prompts_cut(scores) -> str:
    """How many prompts of a data set were too long for a model."""
    readers = scores["student"].where(scores["student"] != "", scores["teacher"]).rename("reader")
    worst = scores.groupby(["dataset", readers], sort=False)[["prompts_cut", "records"]].max()
    found = [
        f"{row['prompts_cut']} of {row['records']} of `{dataset}` for {reader}"
        for (dataset, reader), row in worst.iterrows()
        if row["prompts_cut"]
    ]
    return f"Prompts that were too long and had to be shortened: {', '.join(found) or 'none'}."


def measures(table) -> list[str]:
    """Columns of the table that hold scores: the data sets, and their average."""
    return [name.removesuffix("_std") for name in table.columns if name.endswith("_std")] + [AVERAGE]


def to_markdown(table, comparisons, lines: Sequence[str]) -> str:
    """A page: for each experiment a table with the best student of each column in bold, the differences to SFT, and notes.

    Args:
        table: see `summarise`.
        comparisons: see `kdbench.evaluation.comparisons.compare`.
        lines: the notes.
    """
    columns = measures(table)
    parts = ["# ROUGE-L", ""]
    for experiment, rows in table.groupby("experiment", sort=False):
        first = rows.iloc[0]
        parts += [f"## {experiment}", "", f"Teacher {first['teacher']}, student {rows.iloc[-1]['student']}.", ""]
        parts += ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        best = rows.loc[rows["method"] != "teacher", columns].max().map(_score)
        for _, row in rows.iterrows():
            cells = [
                _cell(row, name, row["method"] != "teacher" and _score(row[name]) == best[name]) for name in columns
            ]
            parts.append("| " + " | ".join([row["variant"] or row["method"], *cells]) + " |")
        parts += ["", spread(rows), ""]
        against = comparisons[(comparisons["experiment"] == experiment) & (comparisons["against"] == "sft")]
        if len(against):
            parts += [*_differences(against, columns), ""]
    return "\n".join([*parts, *(f"- {line}" for line in lines)]).rstrip() + "\n"


def _differences(against, columns: Sequence[str]) -> list[str]:
    """Differences to SFT with their intervals; * where several trainings differ and Holm's correction leaves p at 0.05 or less."""
    lines = ["| difference to sft | " + " | ".join(columns) + " | gap closed |"]
    lines.append("| --- |" + " ---: |" * (len(columns) + 1))
    for method, rows in against.groupby("method", sort=False):
        cells = rows.set_index("dataset")
        shown = [
            f"{one['difference']:+.2f}{'*' if is_sure(one) else ''} [{one['low']:+.2f}, {one['high']:+.2f}]"
            for one in (cells.loc[column] for column in columns)
        ]
        gap = cells.loc[AVERAGE, "gap_closed"]
        lines.append("| " + " | ".join([method, *shown, "" if gap != gap else f"{round(100 * gap)} %"]) + " |")
    seeds = against["training_seeds"].max()
    over = (
        f"over {seeds} training seeds and the records, paired by both. * p ≤ 0.05 after Holm's correction over the methods of a column."
        if seeds > 1
        else "over the records of one training run: no interval for training variance."
    )
    return [
        *lines,
        "",
        f"In brackets the 95 % interval {over} Gap closed: the share of the way from sft to the teacher, of the average.",
    ]


def is_sure(comparison) -> bool:
    """Whether a difference is marked: p of at most 0.05 after Holm's correction, and more than one training to know it from."""
    return comparison["training_seeds"] > 1 and comparison["p_holm"] <= 0.05


def _score(value: float) -> str:
    return f"{value:.2f}"


def _cell(row, name: str, best: bool) -> str:
    text = f"**{_score(row[name])}**" if best else _score(row[name])
    std = row.get(f"{name}_std")
    return text if std is None or std != std else f"{text} ± {std:.2f}"


def spread(rows) -> str:
    """What ± is over, and what one must not read into a single training run."""
    seeds, decodes = rows["training_seeds"].max(), rows["decode_seeds"].max()
    if seeds > 1:
        teacher = (
            f"; for the teacher, over its {decodes} decode seeds" if "decode seeds" in set(rows["std_over"]) else ""
        )
        return f"± is the standard deviation over {seeds} training seeds, each averaged over its decode seeds{teacher}."
    if decodes > 1:
        return f"± is the standard deviation over {decodes} decode seeds of one training run: it says nothing about training."
    return "One training run and one decode seed for each method: this table cannot tell a method's gain from chance."
