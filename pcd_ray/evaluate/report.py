"""One self-contained HTML page: headline numbers, tables, pictures, notes, configuration.

Style and pictures are inside the file; it asks the network for nothing, follows the reader's light
or dark preference and prints.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Link:
    """A cell that leads to another page, relative to this one."""

    text: str
    href: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; rows are as long as the header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.caption!r}: row {list(row)} has {len(row)} cells, the header "
                    f"{len(self.header)}"
                )


@dataclass(frozen=True, slots=True)
class Figure:
    """A PNG picture and what it shows."""

    png: bytes
    caption: str


def render_report(
    *,
    title: str,
    lead: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    notes: Sequence[str],
    config_yaml: str,
) -> str:
    """Return the page as HTML; all text is escaped.

    Args:
        title: heading.
        lead: one paragraph under it.
        tables: the first holds the headline numbers: each row becomes a card with a bar per
            column; the others are drawn as tables.
        figures: in order.
        notes: what a reader must know to judge the numbers.
        config_yaml: the run's whole configuration, folded away.
    """
    parts = [f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>"]
    parts += [_cards(table) for table in tables[:1]]
    parts += [_figure(figure) for figure in figures]
    parts += [_table(table) for table in tables[1:]]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    if config_yaml:
        parts.append(
            "<section><details><summary>Configuration</summary>"
            f"<pre>{escape(config_yaml)}</pre></details></section>"
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _cards(table: Table) -> str:
    cards = "".join(_card(table.header[1:], row) for row in table.rows)
    kind = "cards" if len(table.rows) % 3 == 0 else "cards by-two"
    return f'<section><h2>{escape(table.caption)}</h2><div class="{kind}">{cards}</div></section>'


def _card(names: Sequence[str], linked: Sequence[str | Link]) -> str:
    row = [cell.text if isinstance(cell, Link) else cell for cell in linked]
    numbers = [_number(cell) for cell in row[1:]]
    largest = max((number for number in numbers if number is not None), default=0.0)
    lines = []
    for name, cell, number, hue in zip(names, row[1:], numbers, _hues(names), strict=True):
        width = 100 * number / largest if number is not None and number > 0 else 0
        lines.append(
            f'<dt>{escape(name)}</dt><dd class="bar c{hue}">'
            f'<i style="width:{width:.1f}%"></i></dd><dd class="value">{escape(cell)}</dd>'
        )
    return f'<div class="card"><h3>{escape(row[0])}</h3><dl>{"".join(lines)}</dl></div>'


def _hues(names: Sequence[str]) -> list[int]:
    """Return a colour's number for each bar: grey for the untrained, the others in turn."""
    trained = [name for name in names if not name.startswith("untrained")]
    return [trained.index(name) % 5 + 1 if name in trained else 0 for name in names]


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f'<section><h2>{escape(table.caption)}</h2><div class="wide"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{escape(cell.href)}">{escape(cell.text)}</a>'
    return escape(cell)


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _number(text: str) -> float | None:
    """Return what a cell says as a number, a percent sign or not; None for words and NaN."""
    try:
        value = float(text.strip().removesuffix("%").replace(",", ""))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2026; --soft: #5b6470; --line: #e2e5ea;
  --c0: #9aa3af; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #e69f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --ink: #e8eaed; --soft: #a2abb8; --line: #2e343c;
    --c0: #7b8492; --c1: #4aa8dd; --c2: #e8853a; --c3: #3cc29a; --c4: #dd9bbf; --c5: #f0b429;
  }
  figure img { filter: brightness(0.93); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 72px; }
header { margin-bottom: 40px; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 12px; }
header p { font-size: 18px; color: var(--soft); margin: 0; max-width: 46em; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0 0 14px; }
h3 { font-size: 14px; line-height: 1.4; font-weight: 600; margin: 0 0 14px; }
section, figure { margin: 0 0 36px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 16px; }
.by-two { grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.card, .wide, figure, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
}
.card { display: flex; flex-direction: column; padding: 18px 20px 16px; }
.card dl {
  display: grid; grid-template-columns: auto 1fr auto; gap: 8px 12px; align-items: center;
  margin: auto 0 0;
}
.card dt { font-size: 13px; color: var(--soft); }
.card dd { margin: 0; }
.bar { height: 10px; border-radius: 5px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 5px; }
.c0 i { background: var(--c0); } .c1 i { background: var(--c1); }
.c2 i { background: var(--c2); } .c3 i { background: var(--c3); }
.c4 i { background: var(--c4); } .c5 i { background: var(--c5); }
.value { font-size: 20px; font-weight: 650; text-align: right; font-variant-numeric: tabular-nums; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: 12px; }
figcaption {
  padding: 12px 20px 14px; font-size: 14px; color: var(--soft); border-top: 1px solid var(--line);
}
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { padding: 9px 20px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-size: 13px; font-weight: 600; color: var(--soft); }
tbody tr:last-child td { border-bottom: 0; }
td { font-variant-numeric: tabular-nums; }
a { color: var(--c1); }
ul { margin: 0; padding-left: 20px; color: var(--soft); }
li { margin: 4px 0; }
summary { padding: 13px 20px; font-weight: 600; cursor: pointer; }
pre {
  margin: 0; padding: 16px 20px; border-top: 1px solid var(--line); overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media (max-width: 640px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 26px; }
  th, td { padding: 8px 12px; }
}
@media print {
  :root { --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --line: #cccccc; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .card, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .bar, .bar i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
