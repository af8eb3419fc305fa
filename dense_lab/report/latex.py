"""Tables and plots as LaTeX: bare tables to be `\\input`, and a document that compiles by itself.

Packages: booktabs and graphicx, and for the document inputenc, fontenc, lmodern and geometry.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from dense_lab.report.table import Cell, Table, cell

LONGEST = 40
"""Rows of a table that fit on a page; a longer table is continued in another."""
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    # Not in every font encoding by themselves: a table may be put into a document that has the oldest one.
    '"': r"\char34{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "…": r"\dots{}",
    "∞": r"$\infty$",
    "·": r"$\cdot$",
}
_LIGATURES = re.compile(r"([-,'`?!])(?=[-,'`])")
"""Characters that fonts join, as in `--`."""


def escaped(text: str) -> str:
    """`text` so that LaTeX shows it as it is; letters that its Latin fonts lack become their code points."""
    parts = _LIGATURES.sub(lambda match: match[1] + "\0", text)
    return "".join("{}" if one == "\0" else _character(one) for one in parts)


def _character(one: str) -> str:
    if one in _SPECIAL:
        return _SPECIAL[one]
    if one.isspace():
        return " "
    if one.isascii():
        return one if one.isprintable() else ""
    kind, _, letter = unicodedata.name(one, "").rpartition(" ")
    if kind == "GREEK SMALL LETTER" and letter != "OMICRON":
        # Unicode spells one of them without its b.
        return rf"$\{letter.replace('LAMDA', 'LAMBDA').lower()}$"
    # Accented Latin letters are in every T1 font; anything else would stop the compiler.
    base = unicodedata.normalize("NFKD", one)[0]
    return one if ord(one) < 0x180 and base.isalpha() and base.isascii() else f"[U+{ord(one):04X}]"


def table(given: Table, study: str = "") -> str:
    """One `table` environment, or several when there are more than LONGEST rows; no wider than a line.

    The caption and the label begin with the name of the study, if there is one.
    """
    pieces = [given.rows[first : first + LONGEST] for first in range(0, max(1, len(given.rows)), LONGEST)]
    return "\n".join(_environment(given, study, rows, index, len(pieces)) for index, rows in enumerate(pieces))


def _environment(given: Table, study: str, rows: Iterable[tuple[str | Cell, ...]], index: int, pieces: int) -> str:
    part = f" (part {index + 1} of {pieces})" if pieces > 1 else ""
    name = f"{study}: {given.title[:1].lower()}{given.title[1:]}" if study else given.title
    title = name + part + ("." if not name.endswith(".") else "")
    note = f" {given.note}" if given.note and index == 0 else ""
    shape = "".join("l" if number < given.left else "r" for number in range(len(given.columns)))
    label = f"tab:{_key(name)}" + (f"-{index + 1}" if index else "")
    feet = [rf"\par\noindent\textsuperscript{{{mark}}}~{escaped(text)}" for mark, text in given.footnotes]
    last = index == pieces - 1
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            # The caption stands above, where classes leave no room below it.
            r"\setlength{\belowcaptionskip}{4pt}",
            rf"\centering\footnotesize\caption{{{escaped(title + note)}}}\label{{{label}}}",
            r"\setlength{\tabcolsep}{4pt}",
            # A table that is narrower than the line keeps its size.
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{@{{}}{shape}@{{}}}}",
            r"\toprule",
            _row(given.columns),
            r"\midrule",
            *(_row(row) for row in rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *([r"\par\smallskip\raggedright\scriptsize", *feet] if feet and last else []),
            r"\end{table}",
            "",
        ]
    )


def _key(text: str) -> str:
    """A name that labels may have."""
    return re.sub("[^A-Za-z0-9]+", "-", text).strip("-").lower()


def _row(values: Iterable[str | Cell]) -> str:
    return " & ".join(_cell(cell(value)) for value in values) + r" \\"


def _cell(one: Cell) -> str:
    text = rf"\textbf{{{escaped(one.text)}}}" if one.bold else escaped(one.text)
    # A bracket at the start of a row would be read as the length that `\\` may take.
    text = f"{{}}{text}" if text.startswith(("[", "*")) else text
    return text + (rf"\textsuperscript{{{','.join(one.marks)}}}" if one.marks else "")


def figure(file: str, caption: str, name: str) -> str:
    """A picture from `file`, no wider than a line."""
    return "\n".join(
        [
            r"\begin{figure}[htbp]",
            rf"\centering\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]{{{file}}}",
            rf"\caption{{{escaped(caption)}}}\label{{fig:{_key(name)}}}",
            r"\end{figure}",
            "",
        ]
    )


def document(parts: Iterable[str]) -> str:
    """A document of its own around pieces of LaTeX."""
    head = [
        r"\documentclass[10pt]{article}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage{lmodern,booktabs,graphicx}",
        r"\usepackage[margin=2cm]{geometry}",
        r"\begin{document}",
    ]
    return "\n".join([*head, *parts, r"\end{document}", ""])
