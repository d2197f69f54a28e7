"""The HTML page of a report: one file without links or scripts, in light and dark, on a phone and on paper."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_NUMBER = re.compile(r"(over |under )?[-+$\d]")

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --card: #f5f7f9; --good: #1a6b34; --bad: #a8321c;
  --series-1: #0b4f8a; --series-2: #b04a00; --series-3: #1b6b3a; --series-4: #5b2a86; --bar: #d5e3f0;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e6e9ed; --muted: #9aa4af; --line: #3a424c; --card: #1d232a; --good: #6fce8d; --bad: #ff9a80;
  --series-1: #7db7ee; --series-2: #ffab66; --series-3: #7fd49a; --series-4: #cba6f2; --bar: #24384d;
} }
@media print { :root {
  color-scheme: light;
  --paper: #ffffff; --ink: #000000; --muted: #333333; --line: #bbbbbb; --card: #ffffff; --good: #00501e; --bad: #8a1c08;
  --series-1: #0b4f8a; --series-2: #b04a00; --series-3: #1b6b3a; --series-4: #5b2a86; --bar: #d5e3f0;
} }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 68rem; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0 .75rem; max-width: 46rem }
.about { color: var(--muted); font-size: .9rem }
.verdict { font-size: 1.15rem; font-weight: 600 }
.good { color: var(--good) }
.bad { color: var(--bad) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.4rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.card b { display: block; font-size: 1.5rem; line-height: 1.3 }
.card span { display: block; color: var(--muted); font-size: .82rem; line-height: 1.35 }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem }
figure { margin: 0 0 1rem; max-width: 32rem }
figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: .9rem; color: var(--muted); white-space: pre-line }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start }
.scroll { max-width: 100%; overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tbody th { font-weight: normal; min-width: 5rem }
tr.chosen th, tr.chosen td { font-weight: 600 }
@page { margin: 14mm }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0 }
  .gallery { grid-template-columns: 1fr 1fr }
  figure, table, tr, .card, section { break-inside: avoid }
  section.long { break-inside: auto }
  h2 { break-after: avoid }
  .scroll { overflow: visible }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document. parts: markup that follows the heading."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """kind: about, verdict, or verdict with good or bad."""
    classes = f' class="{kind}"' if kind else ""
    return f"<p{classes}>{escape(text)}</p>\n"


def made_at(version: str, made: datetime | None) -> str:
    return f"emberkv {version}" + ("" if made is None else f", {made:%Y-%m-%d %H:%M} UTC")


def cards(shown: Iterable[tuple[str, str, str]]) -> str:
    """Label, value and a note of each."""
    each = (
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>\n'
        for label, value, note in shown
    )
    return f'<div class="cards">\n{"".join(each)}</div>\n'


def gallery(figures: Iterable[tuple[str, str, str | None]]) -> str:
    """Title, words and the picture (SVG) of each."""
    sections = (
        f"<section>\n<h2>{escape(title)}</h2>\n<figure>\n{svg or ''}\n<figcaption>{escape(words)}</figcaption>\n"
        "</figure>\n</section>\n"
        for title, words, svg in figures
    )
    return f'<div class="gallery">\n{"".join(sections)}</div>\n'


def section(title: str, parts: Iterable[str]) -> str:
    heading = f"<h2>{escape(title)}</h2>"
    return f'<section class="long">\n{heading}\n<div class="tables">\n{"".join(parts)}</div>\n</section>\n'


def table(
    rows: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]],
    *,
    caption: str = "",
    columns: Sequence[str] = (),
    chosen: int | None = None,
) -> str:
    """Rows of a heading and cells; cells that begin with a number stand on the right.

    columns: the head's, the first of them over the headings. chosen: the row that is put in bold.
    """
    pairs = list(rows.items() if isinstance(rows, Mapping) else rows)
    head = "".join(
        f'<th scope="col"{" class=number" if at else ""}>{escape(name)}</th>' for at, name in enumerate(columns)
    )
    lines = (
        f'<tr{" class=chosen" if number == chosen else ""}><th scope="row">{escape(label)}</th>'
        f"{''.join(_cell(cell) for cell in cells)}</tr>\n"
        for number, (label, cells) in enumerate(pairs)
    )
    return (
        f'<div class="scroll"><table>\n{f"<caption>{escape(caption)}</caption>" if caption else ""}'
        f"{f'<thead><tr>{head}</tr></thead>' if columns else ''}\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _cell(text: str) -> str:
    number = _NUMBER.match(text) or not text
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
