"""Writes the report of one study, or of several: an HTML page that opens offline, Markdown, LaTeX, CSV, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dense_lab.errors import InputError
from dense_lab.files import write_json
from dense_lab.report import latex
from dense_lab.report.page import markdown, page
from dense_lab.report.section import Section, overview, section
from dense_lab.report.table import Table
from dense_lab.results import StudyResults


class ReportFiles(NamedTuple):
    """Where the report went."""

    page: Path
    markdown: Path
    latex: Path
    """A document that compiles by itself; the bare tables stand beside it."""
    others: tuple[Path, ...]
    """Bare tables, pictures, numbers for other programs, the certificate."""
    sections: tuple[Section, ...]
    """What was written."""


def write_report(studies: Sequence[StudyResults], folder: Path | None = None) -> ReportFiles:
    """Write the report of studies as they stand, by default of one into `<study>/report/`.

    Of several, each has a section in the page and a folder for its files, and a table at the top sums them up. What
    there is no data for is left out. Raises InputError when two studies have one name, which names their files.
    """
    names = [results.name for results in studies]
    if len(set(names)) < len(names):
        raise InputError(f"two of these studies have one name: {', '.join(sorted(names))}; report them one by one")
    sections = [section(results) for results in studies]
    folder = folder or studies[0].folder / "report"
    single = len(sections) == 1
    others = [path for one in sections for path in _files(one, folder if single else folder / one.results.name)]
    within = {one.results.name: "" if single else f"{one.results.name}/" for one in sections}
    top = [] if single else [overview(sections)]
    forms = {
        "html": page(sections, top),
        "md": markdown(sections, top, within),
        "tex": _document(sections, top, within),
    }
    for form, text in forms.items():
        (folder / f"report.{form}").write_text(text)
    html, down, tex = (folder / f"report.{form}" for form in forms)
    return ReportFiles(html, down, tex, tuple(others), tuple(sections))


def _files(one: Section, folder: Path) -> list[Path]:
    """The files of one study: every table and picture by itself, and its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{table.name}.tex": latex.table(table, one.results.name) for table in one.tables} | one.data
    for picture in one.pictures:
        texts[f"{picture.name}.svg"] = '<?xml version="1.0" encoding="utf-8"?>\n' + picture.svg
    for name, text in texts.items():
        (folder / name).write_text(text)
    for picture in one.pictures:
        (folder / f"{picture.name}.pdf").write_bytes(picture.pdf())
    if one.certificate is not None:
        write_json(folder / "certificate.json", one.certificate)
        texts["certificate.json"] = ""
    return [folder / name for name in (*texts, *(f"{picture.name}.pdf" for picture in one.pictures))]


def _document(sections: Sequence[Section], top: Sequence[Table], within: dict[str, str]) -> str:
    parts = [latex.table(table) for table in top]
    for one in sections:
        parts += [
            rf"\section*{{{latex.escaped(one.results.name)}}}",
            *(latex.escaped(text) + "\n" for text in one.lead),
        ]
        name, place = one.results.name, within[one.results.name]
        parts += [rf"\input{{{place}{table.name}.tex}}" for table in one.head]
        parts += [latex.figure(f"{place}{p.name}.pdf", p.caption, f"{name}-{p.name}") for p in one.pictures]
        parts += [rf"\input{{{place}{table.name}.tex}}" for table in one.tail]
        parts.append(r"\clearpage")
    return latex.document(parts)
