"""The verdict as one HTML page that needs nothing else, and as a fragment for notebooks."""

import re
from collections.abc import Iterable
from html import escape as _quoted

from torchnnfs.testing import plot, report
from torchnnfs.testing.candidates import MissingExtraError
from torchnnfs.testing.outcome import Outcome, plain

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - torchnnfs</title>
<style>body {{ --most: none; max-width: 72rem; margin: 1rem auto; padding: 0 1rem; }}</style>
</head>
<body><main>
{report}
</main></body></html>
"""

# Colours are those of the document, or shades over them, so that every theme fits. The class is
# doubled because a notebook's own rules for tables must lose.
_STYLE = """\
.T { font: 14px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
.T .verdict { margin: 0 0 8px; padding: 8px 14px; border-radius: 8px; color: #fff; }
.T .verdict b { display: block; font-size: 22px; line-height: 1.3; }
.T .good { background: #0a6640; }
.T .doubt { background: #8a5a00; }
.T .bad { background: #b42318; }
.T .scroll { overflow: auto; max-height: var(--most, 290px); border: 1px solid #8886; }
.T table { width: 100%; margin: 0; border: 0; border-collapse: collapse; table-layout: auto;
  font-size: 13px; color: inherit; }
.T :is(th, td) { max-width: none; padding: 2px 10px; border: 0; border-top: 1px solid #8884;
  background: none; font-weight: normal; text-align: left; vertical-align: top;
  white-space: normal; overflow-wrap: normal; word-break: normal; }
.T :is(thead, .group) th { background: #8882; font-weight: bold; white-space: nowrap; }
.T tbody :is(th, td):nth-child(-n+2) { min-width: 90px; overflow-wrap: anywhere; }
.T .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.T .wrong { background: #d5382a33; }
.T .wrong > * { font-weight: bold; }
.T .wrong p { position: sticky; left: 10px; width: fit-content; max-width: calc(100vw - 70px); }
.T p { margin: 4px 0; font-weight: normal; }
.T details { margin: 6px 0 0; }
.T summary { cursor: pointer; font-weight: bold; }
.T .pictures { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.T svg { width: 100%; max-width: 480px; height: auto; fill: currentColor; }
""".replace(".T", ".torchnnfs.torchnnfs")


def page(outcome: Outcome) -> str:
    """A whole page; it loads nothing and runs no script."""
    return _PAGE.format(title=report.headline(outcome)[1], report=fragment(outcome, " open"))


def escape(text: str) -> str:
    """Text as HTML shows it, in one line."""
    return _quoted(plain(text))


def fragment(outcome: Outcome, unfolded: str = "") -> str:
    """The same for a notebook: the verdict and one table, the rest folded away."""
    style, words = report.headline(outcome)
    sentence = report.verdict(outcome).partition(": ")[2]
    if outcome.unjudged and not outcome.ok:
        sentence += f" {report.unjudged(outcome)}."
    said = [f"<p>{escape(remark)}</p>" for remark in report.remarks(outcome)]
    if outcome.controls:
        tried = [
            _line([each.name, each.outcome, each.reason], [], "wrong" * (each.outcome == "passed"))
            for each in outcome.controls
        ]
        said.append(_table(["broken copy of the model", "outcome", "reason"], [], tried))
    facts = [_line([name, fact]) for name, fact in outcome.environment.items()]
    parts = [
        f'<div class="torchnnfs">\n<style>\n{_STYLE}</style>\n<div class="verdict {style}">',
        f"<b>{words}</b>{escape(sentence[0].upper() + sentence[1:])}</div>",
        _layers(outcome),
        _folded("Remarks", said, unfolded or " open" * (style != "good")),
        _folded("Pictures", _pictures(outcome), unfolded),
        _folded("Columns", [f"<p>{_quoted(report.LEGEND)}</p>"], unfolded),
        _folded("Environment", [_table(["fact", "value"], [], facts)], unfolded),
    ]
    return "\n".join([*parts, "</div>"])


def _folded(title: str, content: Iterable[str], unfolded: str) -> str:
    return f"<details{unfolded}>\n<summary>{title}</summary>\n{''.join(content)}\n</details>"


def _layers(outcome: Outcome) -> str:
    # The verdict comes right behind the layer, where a phone still shows it.
    numbers = [heading for heading in report.HEADINGS if heading not in report.WORDS]
    wide = f'colspan="{len(numbers) + 2}"'
    body = []
    for name, rows in outcome.by_candidate.items():
        body.append(f'<tr class="group"><th {wide} scope="rowgroup">{escape(name)}</th></tr>')
        for row in rows:
            _, _, _, layer, *shown, state = report.cells(row)
            body.append(_line([layer, state], shown, "wrong" * (not row.ok)))
            if row.reason:
                body.append(f'<tr class="wrong"><td {wide}><p>{escape(row.reason)}.</p></td></tr>')
    return _table(["layer", "verdict"], numbers, body)


def _table(words: list[str], numbers: list[str], body: list[str]) -> str:
    head = [f'<th scope="col">{name}</th>' for name in words]
    head += [f'<th scope="col" class="number">{name}</th>' for name in numbers]
    lines = [f"<thead><tr>{''.join(head)}</tr></thead>\n<tbody>", *body, "</tbody>"]
    return '<div class="scroll" tabindex="0"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _line(words: list[str], numbers: Iterable[str] = (), style: str = "") -> str:
    first, *rest = map(escape, words)
    shown = [f'<th scope="row">{first}</th>', *(f"<td>{word}</td>" for word in rest)]
    shown += [f'<td class="number">{number}</td>' for number in numbers]
    return f'<tr class="{style}">{"".join(shown)}</tr>'


def _pictures(outcome: Outcome) -> list[str]:
    """The pictures in the colours of the document; they leave the rest of it alone."""
    try:
        drawn = [plot.render(outcome, "svg", name).decode() for name in plot.panels(outcome)]
    except MissingExtraError as error:
        return [f"<p>Left out: {escape(str(error))}</p>"]
    svgs = "\n".join(svg[svg.index("<svg") :] for svg in drawn)
    svgs = svgs.replace("#ffffff", "none").replace("#000000", "currentColor")
    svgs = re.sub(r"(?s)<(style|metadata).*?</\1>", "", svgs)
    return ['<div class="pictures">', re.sub('<g id="[^"]*"', "<g", svgs), "</div>"]
