"""A table with footnotes, as Markdown, HTML and CSV; `latex` has the fourth form."""

from __future__ import annotations

import csv
import html as entities
import io
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """Text that stands out, or points to footnotes."""

    text: str
    bold: bool = False
    marks: tuple[str, ...] = ()
    """Letters of footnotes."""


@dataclass(frozen=True)
class Table:
    """A titled table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    note: str = ""
    """What is said of the whole table."""
    footnotes: tuple[tuple[str, str], ...] = ()
    """Letter and text of each footnote."""
    name: str = ""
    """Of its file, and of the label that LaTeX refers to."""
    left: int = 1
    """Columns from the left that hold names; the others hold numbers."""


@dataclass
class Footnotes:
    """Hands out letters; the same text has one letter."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        """The letter of a footnote."""
        if text not in self.letters:
            number, letters = len(self.letters) + 1, ""
            while number:
                number, last = divmod(number - 1, 26)
                letters = chr(ord("a") + last) + letters
            self.letters[text] = letters
        return self.letters[text]

    def listed(self) -> tuple[tuple[str, str], ...]:
        """Letter and text of each."""
        return tuple((letter, text) for text, letter in self.letters.items())


def cell(value: str | Cell) -> Cell:
    """Plain text as a cell."""
    return value if isinstance(value, Cell) else Cell(value)


def markdown(table: Table) -> str:
    """A heading, the note, a pipe table and the footnotes."""
    rule = tuple("---" if index < table.left else "---:" for index in range(len(table.columns)))
    rows = [[_marked_down(cell(value)) for value in row] for row in (table.columns, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    notes = [f"<sup>{letter}</sup> {plain_markdown(text)}" for letter, text in table.footnotes]
    said = [plain_markdown(table.note)] if table.note else []
    return "\n\n".join([f"## {plain_markdown(table.title)}", *said, "\n".join(lines), *notes])


def plain_markdown(text: str) -> str:
    """`text` with everything escaped that Markdown would read as markup, within a table too."""
    text = re.sub(r"([\\|*`<\[~])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _marked_down(one: Cell) -> str:
    text = plain_markdown(one.text)
    text = f"**{text}**" if one.bold and text else text
    return text + (f"<sup>{','.join(one.marks)}</sup>" if one.marks else "")


def html(table: Table, look: str = "plain", level: int = 2) -> str:
    """The table under a heading of `level`, in a box that scrolls; `look` is its class."""
    head = "".join(f"<th{_side(table, i)}>{entities.escape(name)}</th>" for i, name in enumerate(table.columns))
    body = "".join(
        "<tr>" + "".join(_html_cell(table, i, cell(value)) for i, value in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="sub">{entities.escape(table.note)}</p>' if table.note else ""
    feet = "".join(f"<div><sup>{mark}</sup> {entities.escape(text)}</div>" for mark, text in table.footnotes)
    return (
        f'<h{level}>{entities.escape(table.title)}</h{level}>{note}<div class="scroll"><table class="{look}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<div class="sub notes">{feet}</div>' if feet else "")
    )


def _side(table: Table, index: int) -> str:
    return "" if index < table.left else ' class="number"'


def _html_cell(table: Table, index: int, one: Cell) -> str:
    text = entities.escape(one.text)
    text = f"<strong>{text}</strong>" if one.bold else text
    marks = f"<sup>{','.join(one.marks)}</sup>" if one.marks else ""
    look = ' class="wrap"' if len(one.text) > 60 else _side(table, index)
    return f"<td{look}>{text}{marks}</td>"


def comma_separated(table: Table) -> str:
    """The cells' text as CSV."""
    out = io.StringIO()
    rows = ([cell(value).text for value in row] for row in table.rows)
    csv.writer(out, lineterminator="\n").writerows([table.columns, *rows])
    return out.getvalue()
