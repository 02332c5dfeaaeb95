"""The table for a paper."""

import re

from kdbench.evaluation import latex, tables
from kdbench.evaluation.comparisons import Runs, compare

from .test_tables import SETTINGS, shown, summary


def made(rows) -> str:
    runs = Runs(rows)
    return latex.to_latex(summary(rows), compare(runs), tables.notes(SETTINGS, {}, tables.join(rows)))


def test_best_and_second_of_each_column(tmp_path):
    text = made(shown(tmp_path))
    lines = {line.split(" & ")[0]: line for line in text.splitlines() if line.endswith(r" \\")}
    assert list(lines) == ["method", "teacher", "sft", "uld", r"dskd.reverse\_kl"]
    assert lines["uld"].count(r"\textbf{") == 3
    assert lines[r"dskd.reverse\_kl"].count(r"\underline{") == 3
    for row in ("teacher", "sft"):
        assert "textbf" not in lines[row]
        assert "underline" not in lines[row]
    assert {line.count("&") for line in lines.values()} == {3}
    assert r" $\pm$ " in lines["uld"]
    # Every record is better by 10 in every training, so the differences are sure; sft is not compared with itself.
    assert lines["uld"].count(r"\textsuperscript{*}") == 3
    assert "textsuperscript" not in lines["sft"]


def test_it_is_whole_latex(tmp_path):
    text = made(shown(tmp_path))
    assert re.findall(r"\\begin{(\w+)}", text) == ["table", "tabular"]
    assert re.findall(r"\\end{(\w+)}", text) == ["tabular", "table"]
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    caption = next(line for line in text.splitlines() if line.startswith(r"\caption"))
    assert "sampling at temperature 1" in caption
    assert r"$\pm$ is the standard deviation over 3 training seeds" in caption
    assert "`" not in caption


def test_one_environment_for_each_experiment(tmp_path):
    rows = shown(tmp_path)
    text = made(rows + [row | {"experiment": "other"} for row in rows])
    assert re.findall(r"\\label{(.*)}", text) == ["tab:pair", "tab:other"]


def test_one_training_has_no_marks(tmp_path):
    text = made(shown(tmp_path, trainings=(1,)))
    assert "textsuperscript" not in text
    assert "Holm" not in text


def test_special_characters():
    assert latex.escaped(r"50% of a_b & c$ \x ~^") == (
        r"50\% of a\_b \& c\$ \textbackslash{}x \textasciitilde{}\textasciicircum{}"
    )
