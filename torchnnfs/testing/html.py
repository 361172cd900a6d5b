"""The verdict as one HTML page that needs nothing else, and as a fragment for notebooks."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from html import escape

from torchnnfs.testing import plot
from torchnnfs.testing.candidates import MissingExtraError
from torchnnfs.testing.judge import Row
from torchnnfs.testing.outcome import Outcome
from torchnnfs.testing.report import HEADINGS, LEGEND, cells, headline, remarks, verdict

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{words} - torchnnfs</title>
<style>
body {{ margin: 0; }}
.torchnnfs {{ min-height: 100vh; box-sizing: border-box; }}
</style>
</head>
<body>
<main>
{fragment}
</main>
</body>
</html>
"""

# Every cell has a background of its own: a notebook may stripe its tables in another theme.
_STYLE = """\
<style>
.torchnnfs { --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d1d9e0; --tint: #f6f8fa;
  --good: #0a6640; --bad: #b42318; --bad-tint: #fdecea; --doubt: #8a5a00;
  padding: 1.25rem max(1rem, calc(50% - 36rem)); background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  .torchnnfs { --ink: #e6edf3; --soft: #9da7b1; --paper: #12161c; --line: #353c45; --tint: #1c2129;
    --bad-tint: #3c1b1a; } }
.torchnnfs header { padding: 1.25rem 1.5rem; border-radius: .75rem; color: #fff; }
.torchnnfs header h1 { margin: 0 0 .25rem; font-size: 2.25rem; line-height: 1.1; color: #fff;
  letter-spacing: .02em; }
.torchnnfs header p { margin: 0; }
.torchnnfs .good { background: var(--good); }
.torchnnfs .bad { background: var(--bad); }
.torchnnfs .doubt { background: var(--doubt); }
.torchnnfs h2 { margin: 2rem 0 .5rem; font-size: 1.25rem; color: var(--ink); }
.torchnnfs .scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
.torchnnfs table { width: 100%; margin: 0; border-collapse: collapse; font-size: .875rem;
  overflow-wrap: normal; }
.torchnnfs caption { padding: .5rem .75rem; text-align: left; color: var(--soft); }
.torchnnfs th, .torchnnfs td { padding: .35rem .75rem; border-top: 1px solid var(--line);
  background: var(--paper); color: var(--ink); text-align: left; vertical-align: top;
  font-weight: normal; }
.torchnnfs tbody th[scope=row] { position: sticky; left: 0; min-width: 6.5rem; }
.torchnnfs thead th, .torchnnfs .group th { background: var(--tint); font-weight: 600; }
.torchnnfs .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.torchnnfs .wrong th, .torchnnfs .wrong td { background: var(--bad-tint); font-weight: 600; }
.torchnnfs .worst td { background: var(--bad-tint); border-top: 0; }
.torchnnfs .worst p { position: sticky; left: .75rem; width: fit-content; margin: 0;
  max-width: calc(100vw - 4rem); }
.torchnnfs .note { color: var(--soft); font-size: .875rem; }
.torchnnfs .pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.torchnnfs figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem;
  background: #fff; }
.torchnnfs svg { display: block; width: 100%; max-width: 30rem; height: auto; margin: auto;
  stroke-linejoin: round; }
.torchnnfs dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem 1rem; margin: 0;
  font-size: .875rem; }
.torchnnfs dt { color: var(--soft); font-weight: normal; }
.torchnnfs dd { margin: 0; }
</style>"""

_PICTURES = {
    "points": "the input points, with the class and the confidence that the first candidate gives",
    "bounds": "the largest error of each layer over its bound, on a logarithmic scale",
    "ulps": "histograms of each candidate's errors at the end, in units in the last place",
}


def page(outcome: Outcome) -> str:
    """A whole page; it loads nothing and runs no script."""
    return _PAGE.format(words=headline(outcome)[1], fragment=fragment(outcome))


def fragment(outcome: Outcome) -> str:
    """The same for a document that is already there, such as a notebook."""
    style, words = headline(outcome)
    sentence = verdict(outcome).partition(": ")[2]
    parts = [
        f'<div class="torchnnfs">\n{_STYLE}\n<header class="{style}">\n<h1>{words}</h1>',
        f"<p>{escape(sentence[0].upper() + sentence[1:])}</p>\n</header>",
        f"<h2>Layers</h2>\n{_layers(outcome)}",
        f'<p class="note">{escape(LEGEND)}</p>',
        f"<h2>Controls</h2>\n{_controls(outcome)}",
        "<h2>Remarks</h2>\n<ul>",
        *(f"<li>{escape(remark)}</li>" for remark in remarks(outcome)),
        f"</ul>\n<h2>Pictures</h2>\n{_pictures(outcome)}",
        "<h2>Environment</h2>\n<dl>",
        *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in outcome.environment.items()),
        "</dl>\n</div>",
    ]
    return "\n".join(parts)


def _table(caption: str, headings: str, body: Iterable[str]) -> str:
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{headings}</tr></thead>\n"
        + "\n".join(body)
        + "\n</table>\n</div>"
    )


def _layers(outcome: Outcome) -> str:
    names = HEADINGS[4:-1]
    headings = '<th scope="col">layer</th>'
    headings += "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    headings += '<th scope="col">verdict</th>'
    body = []
    for name, rows in outcome.by_candidate.items():
        group = f'<tr class="group"><th colspan="8" scope="rowgroup">{escape(name)}</th></tr>'
        body.append("\n".join(["<tbody>", group, *map(_row, rows), "</tbody>"]))
    caption = "Every layer against NumPy in float64"
    return _table(caption, headings, body)


def _row(row: Row) -> str:
    shown = [escape(cell) for cell in cells(row)[3:]]
    line = f'<th scope="row">{shown[0]}</th>'
    line += "".join(f'<td class="number">{cell}</td>' for cell in shown[1:-1])
    line += f"<td>{shown[-1]}</td>"
    if row.ok:
        return f"<tr>{line}</tr>"
    return (
        f'<tr class="wrong">{line}</tr>\n<tr class="worst"><td colspan="{len(shown)}">'
        f"<p>{escape(row.reason)}.</p></td></tr>"
    )


def _controls(outcome: Outcome) -> str:
    if not outcome.controls:
        return (
            '<p class="note">No broken twins were tried: nothing shows that this run can fail.</p>'
        )
    headings = "".join(f'<th scope="col">{name}</th>' for name in ("broken", "outcome", "reason"))
    body = []
    for control in outcome.controls:
        style = ' class="wrong"' if control.outcome == "passed" else ""
        cells = f"<td>{escape(control.outcome)}</td><td>{escape(control.reason)}</td>"
        body.append(f'<tr{style}><th scope="row">{escape(control.name)}</th>{cells}</tr>')
    caption = "Deliberately broken twins of the model, which the judge has to reject"
    return _table(caption, headings, ["<tbody>", *body, "</tbody>"])


def _pictures(outcome: Outcome) -> str:
    try:
        drawn = {name: plot.render(outcome, "svg", name).decode() for name in plot.panels(outcome)}
    except MissingExtraError as error:
        return f'<p class="note">Left out: {escape(str(error))}</p>'
    figures = [f"<figure>\n{_inline(svg, _PICTURES[name])}</figure>" for name, svg in drawn.items()]
    return "\n".join(['<div class="pictures">', *figures, "</div>"])


def _inline(svg: str, description: str) -> str:
    """An SVG file as an element that leaves the rest of the document alone."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # With the ids of another picture in the document, this one would show parts of that.
    prefix = rf"\1p{zlib.crc32(svg.encode()):x}-"
    svg = re.sub("<[^>]*>", lambda tag: re.sub(r'( id="|href="#|url\(#)', prefix, tag[0]), svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
