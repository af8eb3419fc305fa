"""The report as one HTML page that needs nothing from outside, and as Markdown."""

from __future__ import annotations

import html as entities
from collections.abc import Mapping, Sequence

from dense_lab.report.section import Section
from dense_lab.report.table import Table, html, plain_markdown
from dense_lab.report.table import markdown as table_markdown

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2, h3 { margin: 2.2rem 0 .3rem; } .sub { color: #666; margin: .2rem 0 .6rem; }
.notes { font-size: 13px; margin-top: .5rem; } .fair { border-left: 4px solid #009e73; padding-left: .7rem; }
.unfair { border-left: 4px solid #d55e00; padding-left: .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
td.wrap { white-space: normal; overflow-wrap: anywhere; } .number { text-align: right; }
th { border-bottom: 2px solid #999; } table.ranked tbody tr:first-child td { font-weight: 600; }
figure { margin: 0; } figcaption { color: #666; font-size: 13px; max-width: 46rem; }
svg { max-width: 100%; height: auto; } .plots { display: flex; flex-wrap: wrap; gap: 2rem; }
section + section { border-top: 1px solid #ccc; margin-top: 3rem; }
"""


def page(sections: Sequence[Section], top: Sequence[Table]) -> str:
    """The page; `top` are tables over all studies, whose rows link to them."""
    several = len(sections) > 1
    title = ", ".join(one.results.name for one in sections)
    contents = " · ".join(
        f'<a href="#{entities.escape(one.results.name)}">{entities.escape(one.results.name)}</a>' for one in sections
    )
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{entities.escape(title)} - dense-lab</title><style>{STYLE}</style></head><body>",
            f"<h1>{len(sections)} studies</h1><p>{contents}</p>" if several else "",
            *(html(table) for table in top),
            *(_section(one, 2 if several else 1) for one in sections),
            "</body></html>\n",
        ]
    )


def _section(one: Section, level: int) -> str:
    name = entities.escape(one.results.name)
    return "".join(
        [
            f'<section id="{name}"><h{level}>{name}</h{level}>',
            f'<p class="sub">dense-lab {one.results.kind} {entities.escape(one.results.digest)}</p>',
            *(f"<p{_standing(one, index)}>{entities.escape(text)}</p>" for index, text in enumerate(one.lead)),
            *(html(table, "plain" if one.ablated else "ranked", level + 1) for table in one.head),
            _figures(one, level + 1),
            *(html(table, "plain", level + 1) for table in one.tail),
            "</section>",
        ]
    )


def _standing(one: Section, index: int) -> str:
    """How the certificate's line, the second one, is set off."""
    certificate = one.ablated.certificate if one.ablated else None
    if index == 0 or certificate is None:
        return ""
    return ' class="fair"' if certificate.fair else ' class="unfair"'


def _figures(one: Section, level: int) -> str:
    figures = "".join(
        f"<figure>{picture.svg}<figcaption>{entities.escape(picture.caption)}</figcaption></figure>"
        for picture in one.pictures
    )
    return f'<h{level}>Plots</h{level}><div class="plots">{figures}</div>' if figures else ""


def markdown(sections: Sequence[Section], top: Sequence[Table], within: Mapping[str, str]) -> str:
    """The same as Markdown; `within` says where each study's pictures are."""
    parts = [table_markdown(table) for table in top]
    for one in sections:
        parts += [f"# {plain_markdown(one.results.name)}", *(plain_markdown(text) for text in one.lead)]
        parts += [table_markdown(table) for table in one.head]
        place = within[one.results.name]
        parts += [f"![{plain_markdown(p.caption)}]({place}{p.name}.svg)" for p in one.pictures]
        parts += [table_markdown(table) for table in one.tail]
    return "\n\n".join(parts) + "\n"
