"""The table for a paper: LaTeX with booktabs."""

from collections.abc import Sequence

from kdbench.evaluation.comparisons import AVERAGE
from kdbench.evaluation.tables import is_sure, measures, spread

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≤": r"$\le$",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def to_latex(table, comparisons, notes: Sequence[str]) -> str:
    """For each experiment a `table` environment, with the best student of each column in bold and the second best underlined.

    The document needs the package booktabs. * marks students that differ from SFT, see `is_sure`.

    Args:
        table: see `kdbench.evaluation.tables.summarise`.
        comparisons: see `kdbench.evaluation.comparisons.compare`.
        notes: for the caption, see `kdbench.evaluation.tables.notes`.
    """
    marked = {
        (one["experiment"], one["method"], one["dataset"])
        for _, one in comparisons[comparisons["against"] == "sft"].iterrows()
        if is_sure(one)
    }
    parts = ["% needs \\usepackage{booktabs}"]
    for experiment, rows in table.groupby("experiment", sort=False):
        parts += ["", *_environment(experiment, rows, measures(table), marked, notes)]
    return "\n".join(parts) + "\n"


def _environment(experiment, rows, columns, marked, notes) -> list[str]:
    students = rows[rows["method"] != "teacher"]
    ranks = {name: sorted({_rounded(value) for value in students[name]}, reverse=True) for name in columns}
    lines = []
    for _, row in rows.iterrows():
        name = row["variant"] or row["method"]
        cells = [_cell(row, column, ranks[column], (experiment, name, column) in marked) for column in columns]
        lines.append(" & ".join([escaped(name), *cells]) + r" \\")
        if row["method"] == "teacher":
            lines.append(r"\midrule")
    pair = f"Teacher {rows.iloc[0]['teacher']}, student {rows.iloc[-1]['student']}."
    star = "* p ≤ 0.05 for the difference to sft, after Holm's correction over the methods of a column."
    caption = " ".join([pair, *notes, spread(rows), *([star] if rows["training_seeds"].max() > 1 else [])])
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption.replace('`', ''))}}}",
        rf"\label{{tab:{experiment}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["method", *map(escaped, columns)]) + r" \\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _cell(row, column: str, ranks: Sequence[float], marked: bool) -> str:
    score = _rounded(row[column])
    text = f"{score:.2f}"
    if row["method"] != "teacher" and score in ranks[:2]:
        text = rf"\textbf{{{text}}}" if score == ranks[0] else rf"\underline{{{text}}}"
    std = row.get(f"{column}_std") if column != AVERAGE else None
    if std is not None and std == std:
        text += rf" $\pm$ {std:.2f}"
    return text + (r"\textsuperscript{*}" if marked else "")


def _rounded(value: float) -> float:
    """As it is shown, so that scores that look alike share a rank."""
    return round(float(value), 2)


def escaped(text: str) -> str:
    """Text with the characters that mean something to LaTeX made harmless."""
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
