"""From scores to the table: long form, summary, and a page to read. Pure functions on data frames, and their files."""

import re
from collections.abc import Sequence
from pathlib import Path

from kdbench import files
from kdbench.errors import UserError

KEYS = ["experiment", "method", "student", "teacher", "objective", "variant"]
_RUN = re.compile(
    r"(?:/seed(?P<training_seed>\d+))?/evaluation/(?P<dataset>[^/]+)/decode(?P<decode_seed>\d+)/scores\.json$"
)
_MEASURES = ["rouge_l", "records", "share_truncated", "share_empty", "mean_tokens"]


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
        where = _RUN.search(Path(path).as_posix())
        if where is None:
            raise UserError(f"{path} does not lie in a folder evaluation/<data set>/decode<seed>")
        scores = files.read_json(path)
        rows.append(
            {key: value or "" for key, value in where.groupdict().items()} | {key: scores[key] for key in _MEASURES}
        )
    return pd.DataFrame(rows)


def join(shown: Sequence[dict]):
    """The long table of everything that a table shows.

    Args:
        shown: rows of the table to be, in order: `experiment`, `method`, `student`, `teacher`, `objective`, `variant`, and `scores`, the
            path of a long table of `collect`.
    """
    import pandas as pd

    frames = []
    for row in shown:
        frame = pd.read_csv(
            row["scores"],
            dtype={"training_seed": "string", "decode_seed": "string", "dataset": "string"},
            keep_default_na=False,
        )
        named = {key: row[key] for key in KEYS} | ({"student": ""} if row["method"] == "teacher" else {})
        frames.append(frame.assign(**named)[[*KEYS, *frame.columns]])
    return pd.concat(frames, ignore_index=True)


def summarise(scores):
    """The table: a row for each experiment, model, method and objective.

    For each data set its mean and standard deviation (n - 1): over training seeds, each averaged over its decode seeds, where there are
    several; else over decode seeds; else empty. `std_over` says which. `average` is the mean over data sets.

    Args:
        scores: long table of `join`.

    Raises:
        UserError: a combination of training seed, data set and decode seed is missing or there twice.
    """
    import pandas as pd

    datasets = list(dict.fromkeys(scores["dataset"]))
    rows = []
    for key, group in scores.groupby(KEYS, sort=False, dropna=False):
        row = dict(zip(KEYS, key, strict=True))
        of = group.pivot_table(
            index="training_seed", columns=["dataset", "decode_seed"], values="rouge_l", aggfunc=["count", "mean"]
        )
        if of.isna().any(axis=None) or (of["count"] != 1).any(axis=None):
            raise UserError(
                f"{row['experiment']}, {row['variant'] or row['method']}: its seeds, data sets and decode seeds are not complete"
            )
        decodes = [group.loc[group["dataset"] == dataset, "decode_seed"].nunique() for dataset in datasets]
        for dataset in datasets:
            values = of["mean"][dataset]
            seeds = values.mean(axis=1)
            row[dataset] = seeds.mean()
            row[f"{dataset}_std"] = seeds.std() if len(seeds) > 1 else values.iloc[0].std()
        over = "training seeds" if len(of) > 1 else "decode seeds" if max(decodes) > 1 else ""
        row |= {"average": sum(row[dataset] for dataset in datasets) / len(datasets)}
        rows.append(row | {"training_seeds": len(of), "decode_seeds": max(decodes), "std_over": over})
    return pd.DataFrame(rows)


def write_csv(path, frame) -> None:
    """CSV in full precision, all or nothing."""
    files.write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def write_table(path, table) -> None:
    """The summary as CSV, scores with two decimals."""
    files.write_text(path, table.to_csv(index=False, float_format="%.2f", lineterminator="\n"))


def notes(settings: dict, alignments: dict[str, dict]) -> list[str]:
    """What a reader has to know of the numbers.

    Args:
        settings: `decoding` and `text`.
        alignments: folder -> manifest of the alignment of each pair of models.
    """
    decoding, text = settings["decoding"], settings["text"]
    how = (
        "greedily"
        if decoding["temperature"] == 0
        else f"by sampling at temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    )
    if decoding["no_repeat_ngram_size"]:
        how += f", without repeated {decoding['no_repeat_ngram_size']}-grams"
    lines = [
        "Scores are ROUGE-L F1, 0 to 100, the maximum over the references, averaged over the records.",
        f"Answers were generated {how}, {decoding['max_new_tokens']} tokens at most, to prompts of the template `{text['template']}` of"
        f" {text['max_prompt_tokens']} tokens at most.",
    ]
    for folder, manifest in alignments.items():
        quality = manifest["quality"]
        lines.append(
            f"Tokens of `{'/'.join(Path(folder).parts[-2:])}`: {quality['byte']:.1%} of the student's response tokens cover the same bytes as one"
            f" of the teacher's; by index alone {quality['index']:.1%} would be paired with the same bytes."
        )
    return lines


def to_markdown(table, lines: Sequence[str]) -> str:
    """A page: for each experiment a table with the best student of each column in bold, and notes.

    Args:
        table: see `summarise`.
        lines: the notes.
    """
    columns = [name.removesuffix("_std") for name in table.columns if name.endswith("_std") and name != "std"] + [
        "average"
    ]
    parts = ["# ROUGE-L", ""]
    for experiment, rows in table.groupby("experiment", sort=False):
        first = rows.iloc[0]
        parts += [f"## {experiment}", "", f"Teacher {first['teacher']}, student {rows.iloc[-1]['student']}.", ""]
        parts += ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        students = rows[rows["method"] != "teacher"]
        for _, row in rows.iterrows():
            best = {name for name in columns if row["method"] != "teacher" and row[name] == students[name].max()}
            cells = [_cell(row, name, name in best) for name in columns]
            parts.append("| " + " | ".join([row["variant"] or row["method"], *cells]) + " |")
        parts += ["", _spread(rows), ""]
    return "\n".join([*parts, *(f"- {line}" for line in lines)]).rstrip() + "\n"


def _cell(row, name: str, best: bool) -> str:
    text = f"{row[name]:.2f}"
    text = f"**{text}**" if best else text
    std = row.get(f"{name}_std")
    return text if std is None or std != std else f"{text} ± {std:.2f}"


def _spread(rows) -> str:
    """What ± is over, and what one must not read into a single training run."""
    students = rows[rows["method"] != "teacher"]
    seeds = students["training_seeds"].max() if len(students) else 1
    if seeds > 1:
        return f"± is the standard deviation over {seeds} training seeds, each averaged over its decode seeds."
    if rows["decode_seeds"].max() > 1:
        return f"± is the standard deviation over {rows['decode_seeds'].max()} decode seeds of one training run: it says nothing about training."
    return "One training run and one decode seed for each method: differences of a point or two may be chance."
