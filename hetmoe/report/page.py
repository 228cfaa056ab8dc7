"""The page: one HTML file that needs neither network nor scripts."""

import dataclasses
import html
from collections.abc import Sequence

from hetmoe.report.facts import Facts
from hetmoe.report.tables import Table

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
       background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; padding-top: .5rem; border-top: 2px solid #d0d0d0; font-size: 1.35rem; }
h3 { margin-top: 1.6rem; font-size: 1.1rem; }
a { color: #0a558c; }
nav ul { padding-left: 1.2rem; columns: 20rem; }
.status { padding: .6rem .8rem; border-left: 5px solid #009e73; background: #f1f8f5; }
.status.unfinished { border-color: #d55e00; background: #fdf3ec; font-weight: 600; }
figure { margin: 1.2rem 0; }
figcaption, caption { color: #444; font-size: .92rem; text-align: left; }
caption { padding-bottom: .3rem; caption-side: top; }
.wide { max-width: 100%; overflow-x: auto; margin: .8rem 0; }
.wide:focus-visible { outline: 2px solid #0a558c; }
.wide svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.wide table { overflow-wrap: normal; min-width: min(100%, 36rem); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
.numbers td { text-align: right; white-space: nowrap; }
.numbers thead th + th { text-align: right; }
.numbers tbody th { white-space: nowrap; font-weight: 500; }
thead th { border-bottom: 2px solid #999; }
.facts th { font-weight: 500; color: #444; width: 34%; }
.facts table { width: 100%; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure: its `<svg>`, the least width that keeps its text readable, and its files."""

    svg: str
    min_width: int  # CSS pixels
    caption: str
    files: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what belongs under it; a section of level 3 belongs to the one of level 2 before it."""

    anchor: str
    title: str
    level: int
    paragraphs: Sequence[str] = ()
    facts: Facts = dataclasses.field(default_factory=list)
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    files: Sequence[str] = ()  # of the tables


def render_page(title: str, status: str, *, finished: bool, sections: Sequence[Section]) -> str:
    """The whole document; every string is escaped but the pictures' `<svg>`."""
    state = "status" if finished else "status unfinished"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',  # else a browser asks the server for one
            f"<title>{html.escape(title)}</title>",
            f"<style>{_CSS}</style>",
            "</head>",
            "<body>",
            "<header>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="{state}">{html.escape(status)}</p>',
            "</header>",
            _contents(sections),
            "<main>",
            *(_section(section) for section in sections),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _contents(sections: Sequence[Section]) -> str:
    parts = ['<nav aria-label="Contents">', "<h2>Contents</h2>", "<ul>"]
    nested = False
    for index, section in enumerate(sections):
        link = f'<a href="#{section.anchor}">{html.escape(section.title)}</a>'
        following = sections[index + 1].level if index + 1 < len(sections) else 2
        if section.level == 2 and following == 3:
            parts.append(f"<li>{link}<ul>")
            nested = True
        else:
            parts.append(f"<li>{link}</li>")
            if nested and following == 2:
                parts.append("</ul></li>")
                nested = False
    return "\n".join([*parts, "</ul>", "</nav>"])


def _section(section: Section) -> str:
    parts = [f'<h{section.level} id="{section.anchor}">{html.escape(section.title)}</h{section.level}>']
    parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    if section.facts:
        rows = "\n".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
            for name, value in section.facts
        )
        parts.append(f'<div class="facts"><table><tbody>\n{rows}\n</tbody></table></div>')
    parts += [_picture(picture) for picture in section.pictures]
    parts += [_table(table) for table in section.tables]
    if section.files:
        parts.append(f"<p>As CSV, all conditions: {_links(section.files)}</p>")
    return "\n".join(parts)


def _picture(picture: Picture) -> str:
    label = html.escape(picture.caption)
    width = f"min-width:{picture.min_width}px;max-width:{picture.min_width * 4 // 3}px"
    return (
        f'<figure><div class="wide" role="region" tabindex="0" aria-label="Figure, scrolls sideways">'
        f'<div style="{width}">{picture.svg}</div></div>\n'
        f"<figcaption>{label} Files: {_links(picture.files)}.</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    return (
        f'<div class="wide numbers" role="region" tabindex="0" aria-label="Table, scrolls sideways"><table>'
        f"<caption>{html.escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
        "</table></div>"
    )


def _links(files: Sequence[str]) -> str:
    return ", ".join(f'<a href="{html.escape(name)}">{html.escape(name)}</a>' for name in files)
