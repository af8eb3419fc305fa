"""LaTeX: names are shown as they are, tables have the right shape, and all of it compiles where there is a compiler."""

import re
import shutil
import subprocess

import pytest

from dense_lab.report import latex
from dense_lab.report.table import Cell, Table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("span_1", r"span\_1"),
        ("50% & #1", r"50\% \& \#1"),
        ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ("{$x}", r"\{\$x\}"),
        ("a--b", "a-{}-b"),
        ("−0.1 ±", r"$-$0.1 $\pm$"),
        ("φ λ é 語", r"$\phi$ $\lambda$ é [U+8A9E]"),
        ("a\nb", "a b"),
    ],
)
def test_characters_are_escaped(text, expected):
    assert latex.escaped(text) == expected


def test_nothing_special_is_left_in_any_printable_text():
    text = "".join(map(chr, range(32, 127)))
    left = latex.escaped(text)
    for command in (r"\\[a-z]+\{\}", r"\\char34\{\}", r"\\[{}$&#%_]", r"\{\}"):
        left = re.sub(command, "", left)
    assert not set(left) & set("\\{}$&#%_^~")


def table(rows):
    return Table("T_1", ("arm", "loss"), rows, footnotes=(("a", "50%"),))


def test_a_table_has_its_rules_bold_marks_and_notes():
    text = latex.table(table((("plain", "1"), (Cell("x_1", bold=True, marks=("a",)), "2"))), "s")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\textbf{x\_1}\textsuperscript{a} & 2 \\" in text
    assert r"\textsuperscript{a}~50\%" in text
    assert r"\caption{s: t\_1.}\label{tab:s-t-1}" in text
    assert r"\begin{tabular}{@{}lr@{}}" in text


def test_a_long_table_is_continued():
    text = latex.table(table(tuple((str(i), "0") for i in range(latex.LONGEST + 1))))
    assert text.count(r"\begin{table}") == 2
    assert "(part 2 of 2)" in text
    assert text.count("50") == 1 + 0  # The notes stand below the last part only; no row is called 50.


def test_a_bracket_at_the_start_of_a_row_is_no_argument():
    assert r"{}[x] & 1" in latex.table(table((("[x]", "1"),)))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX: apt-get install texlive-latex-extra")
def test_the_document_of_several_studies_compiles(both):
    # The oldest font encoding too: a table may be put into a document that says nothing of fonts.
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    bare = head + r"\input{small/verdicts.tex}\end{document}"
    (both.latex.parent / "bare.tex").write_text(bare)
    for name in (both.latex.name, "bare.tex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name]
        done = subprocess.run(command, cwd=both.latex.parent, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Overfull \\hbox" not in done.stdout
        assert (both.latex.parent / name).with_suffix(".pdf").exists()
