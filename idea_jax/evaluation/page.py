"""The parts of a report's HTML: tables that sort, pictures within the page, and the plot.

Names and texts come from strangers' folders. Whatever is not a number goes through `escape`, and
the page's own policy forbids everything that is not in it.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from idea_jax.data.images import encode_png

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --dim: #5c5c5c; --line: #cfcfcf; --back: #fff;
  --row: #f4f4f4; --c0: #0b62b8; --c1: #b4430a; --c2: #1d7a3c; --c3: #8a2be2; --c4: #a3690b;
  --c5: #b3146b; --c6: #0a7f86; --c7: #606060 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --dim: #a8a8a8; --line: #4a4a4a;
  --back: #161616; --row: #222; --c0: #6db3ff; --c1: #ff9a5c; --c2: #6fd08c; --c3: #c79bff;
  --c4: #e6b45c; --c5: #ff86c0; --c6: #5cd3da; --c7: #b0b0b0 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--back); overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem }
td, th { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid var(--line) } tbody tr:nth-child(even) { background: var(--row) }
td:not(.number) { min-width: 6rem } th { min-width: 4.5rem }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th button { all: unset; cursor: pointer; font-weight: bold }
th button:focus-visible { outline: 2px solid var(--c0) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
figure { display: inline-block; margin: 0 .5rem .5rem 0; vertical-align: top; width: 7rem }
figcaption { font-size: .75rem; line-height: 1.25; color: var(--dim) }
img { display: block; max-width: 100%; border-radius: 4px } .dim { color: var(--dim) }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 12px system-ui }
svg .axis { stroke: var(--line) } svg .bound { stroke: var(--dim); stroke-dasharray: 5 4 }
"""

# Sorts the rows of a table by the column whose head is pressed; what has no value comes last.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const place = [...head.parentElement.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.children[place].dataset.value ?? row.children[place].textContent;
  const rows = [...body.rows].map(row => [value(row), row]);
  const numeric = rows.every(([v]) => v === "" || !isNaN(v));
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numeric ? a - b : a.localeCompare(b);
    return up ? order : -order;
  });
  for (const [, row] of rows) body.append(row);
};
"""


class Point(NamedTuple):
    """A method on the plot: means of both scores with their intervals, and a dot for each person.

    Attributes:
      x, y: mean, low and high; the last two are None where there is no interval.
      dots: (x, y) of people.
    """

    name: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]
    dots: Sequence[tuple[float, float]]


def escape(text: object) -> str:
    """Any text as HTML shows it, also within quotation marks; letters that no page can hold and
    those that turn the direction of the text around become escapes."""
    shown = "".join(
        character if character.isprintable() or character == "\n" else f"\\u{ord(character):04x}"
        for character in str(text)
    )
    return html.escape(shown, quote=True)


def number(value: float | None, form: str = ".3f") -> str:
    """A cell of a table that sorts by the value; a dash where there is none."""
    if value is None:
        return '<td class=number data-value="">&ndash;</td>'
    return f'<td class=number data-value="{value:.9g}">{value:{form}}</td>'


def words(text: object) -> str:
    """A cell with text."""
    return f"<td>{escape(text)}</td>"


def interval(estimate: Mapping | None, form: str = ".3f") -> str:
    """A cell with a mean and its interval, which sorts by the mean."""
    if estimate is None:
        return number(None)
    said = f"{estimate['mean']:{form}}"
    if estimate["low"] is not None:
        low, high = (f"{estimate[end]:{form}}" for end in ("low", "high"))
        said += f"<br><span class=dim>{low} to {high}</span>"
    return f'<td class=number data-value="{estimate["mean"]:.9g}">{said}</td>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table that sorts; the cells are HTML already.

    Args:
      name: its id.
    """
    head = "".join(f"<th scope=col><button type=button>{escape(h)}</button></th>" for h in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class=wide><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(image: Image.Image, caption: str, *, is_generated: bool) -> str:
    """A picture that lies in the page; a generated one carries its mark there, too."""
    if is_generated:
        data, kind = encode_png(np.asarray(image), {}), "png"
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def scatter(
    points: Sequence[Point],
    labels: tuple[str, str],
    bounds: Mapping[str, float | None],
    size: tuple[int, int] = (760, 460),
) -> str:
    """The plot of two scores as SVG: methods with their intervals, people as dots, and bounds of
    the vertical one as broken lines."""
    width, height = size
    left, right, top, bottom = 60, 80, 16 * len(points) + 16, 48
    height += 16 * len(points)
    xs = [x for p in points for x in (*p.x, *(d[0] for d in p.dots)) if x is not None]
    ys = [y for p in points for y in (*p.y, *(d[1] for d in p.dots)) if y is not None]
    ys += [value for value in bounds.values() if value is not None]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at_x(value):
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return left + share * (width - left - right)

    def at_y(value):
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - share * (height - top - bottom)

    parts = []
    for value in x_ticks:
        x = at_x(value)
        parts.append(f"<line class=axis x1={x:.1f} x2={x:.1f} y1={top} y2={height - bottom} />")
        parts.append(
            f"<text x={x:.1f} y={height - bottom + 16} text-anchor=middle>{value:.3g}</text>"
        )
    for value in y_ticks:
        y = at_y(value)
        parts.append(f"<line class=axis x1={left} x2={width - right} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{value:.3g}</text>")
    for name, value in bounds.items():
        if value is not None:
            y = at_y(value)
            line = f"x1={left} x2={width - right} y1={y:.1f} y2={y:.1f}"
            parts.append(f"<line class=bound {line} />")
            parts.append(f"<text x={width - right + 8} y={y + 4:.1f}>{escape(name)}</text>")
    for place, point in enumerate(points):
        parts += _marks(point, f"var(--c{place % 8})", at_x, at_y)
        y = 16 * (place + 1)
        style = f'style="fill: var(--c{place % 8})"'
        parts.append(f"<text x={left} y={y} {style}>{escape(point.name)}</text>")
    middle = (left + width - right) / 2
    parts.append(
        f"<text x={middle:.0f} y={height - 8} text-anchor=middle>{escape(labels[0])}</text>"
    )
    turn = f"rotate(-90 14 {height / 2:.0f})"
    parts.append(
        f'<text x=14 y={height / 2:.0f} text-anchor=middle transform="{turn}">'
        f"{escape(labels[1])}</text>"
    )
    return (
        f'<svg id=scatter width={width} height={height} viewBox="0 0 {width} {height}" role=img '
        f'aria-label="{escape(labels[1])} against {escape(labels[0])}">{"".join(parts)}</svg>'
    )


def _marks(point: Point, colour: str, at_x, at_y) -> list[str]:
    """A dot for each person, a cross of both intervals, and a circle on the mean."""
    found = [
        f'<circle cx={at_x(x):.1f} cy={at_y(y):.1f} r=2.5 style="fill: {colour}" opacity=.35 />'
        for x, y in point.dots
    ]
    x, y = at_x(point.x[0]), at_y(point.y[0])
    if point.x[1] is not None:
        ends = f"x1={at_x(point.x[1]):.1f} x2={at_x(point.x[2]):.1f} y1={y:.1f} y2={y:.1f}"
        found.append(f'<line {ends} style="stroke: {colour}" stroke-width=2 />')
    if point.y[1] is not None:
        ends = f"x1={x:.1f} x2={x:.1f} y1={at_y(point.y[1]):.1f} y2={at_y(point.y[2]):.1f}"
        found.append(f'<line {ends} style="stroke: {colour}" stroke-width=2 />')
    title = f"<title>{escape(point.name)}</title>"
    found.append(
        f'<circle class=method cx={x:.1f} cy={y:.1f} r=6 style="fill: {colour}">{title}</circle>'
    )
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, five or so, that begin below `low` and end above `high`."""
    span = max(high - low, 1e-3)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def document(title: str, body: str) -> str:
    """A whole page that needs no other file, and may load none."""
    return (
        f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">\n'
        f'<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</html>\n"
    )
