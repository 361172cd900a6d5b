import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html import escape, unescape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from torchnnfs import Dense, classifier, compare
from torchnnfs.testing import html
from torchnnfs.testing.report import cells, remarks, verdict

VOID = {"meta", "br", "img", "link", "input"}
#: Drawing takes half a second.
page, fragment = cache(html.page), cache(html.fragment)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = Dense(2, 2)

    def forward(self, input):
        return torch.softmax(input + self.dense(input), -1)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, document):
        super().__init__()
        self.open, self.elements, self.text = [], [], Counter()
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = f"{self.text[self.open[-1]] or ''}{data}"

    def all(self, tag):
        return [attributes for each, attributes in self.elements if each == tag]


@pytest.fixture(scope="module")
def partly():
    """A comparison of which nothing independent judged a part."""
    return compare(Residual(), torch.randn(5, 2), candidates=["eager"], controls=False)


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def rows_of(document):
    """The cells of each line of the first table, without the names of candidates and reasons."""
    body = document[document.index("<tbody>") : document.index("</tbody>")]
    lines = re.findall(r"<tr class=\"(.*?)\">(.*?)</tr>", body)
    split = [(style, re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line)) for style, line in lines]
    return [(style, [unescape(cell) for cell in line]) for style, line in split if len(line) > 1]


@pytest.mark.parametrize("write", [html.page, html.fragment])
@pytest.mark.usefixtures("no_matplotlib")
def test_the_verdict_comes_first(write, agreeing, disagreeing, partly):
    little = tuple(replace(each, outcome="passed") for each in agreeing.controls)
    for comparison, kind, words in (
        (agreeing, "good", "Agrees"),
        (disagreeing, "bad", "Disagrees"),
        (partly, "doubt", "Agrees as far as judged"),
        (replace(agreeing, controls=little), "doubt", "Agrees, but this run proves little"),
    ):
        document = write(comparison)
        read = Reader(document)
        assert read.all("div")[1] == {"class": f"verdict {kind}"}
        assert read.text["b"] == words
        assert verdict(comparison).partition(": ")[2][1:] in unescape(document)
        assert document.index(f"<b>{words}</b>") < document.index("<table")
        assert read.text["title"] in (0, f"{words} - torchnnfs")


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.usefixtures("no_matplotlib")
def test_what_nothing_independent_judged_is_named(ok, partly):
    assert partly.unjudged
    rows = tuple(replace(row, state="ok" if ok else "differs") for row in partly.rows)
    top = fragment(replace(partly, rows=rows)).partition("<table")[0]
    assert top.count("Nothing independent judged") == 1
    for name in partly.unjudged:
        assert name in top


def test_each_row_has_its_verdict_right_behind_its_layer(agreeing, disagreeing):
    for comparison in (agreeing, disagreeing):
        shown = rows_of(page(comparison))
        assert len(shown) == len(comparison.rows) == 8
        for (style, line), row in zip(shown, comparison.rows, strict=True):
            _, _, _, layer, *numbers, said = cells(row)
            assert line == [layer, said, *numbers]
            assert style == ("" if row.ok else "wrong")


def test_a_row_that_is_wrong_says_why(disagreeing):
    document = unescape(page(disagreeing))
    wrong = [row for row in disagreeing.rows if not row.ok]
    assert len(wrong) >= 3
    for row in wrong:
        assert f"<p>{row.reason}.</p>" in document


def test_every_control_remark_and_fact_is_there(agreeing):
    document = unescape(page(agreeing))
    assert len(agreeing.controls) > 9
    for control in agreeing.controls:
        assert f"{control.name}</th><td>{control.outcome}</td><td>{control.reason}<" in document
    for remark in remarks(agreeing):
        assert f"<p>{remark}</p>" in document
    for name, fact in agreeing.environment.items():
        assert f"{name}</th><td>{fact}</td>" in document
    assert len(Reader(document).all("svg")) == 3


def test_a_notebook_shows_the_verdict_and_folds_away_the_rest(agreeing, disagreeing):
    for comparison, unfolded in ((agreeing, []), (disagreeing, ["Remarks"])):
        document = fragment(comparison)
        assert re.findall(r"<details open>\s*<summary>(\w+)", document) == unfolded
        assert Reader(document).text["summary"] == "RemarksPicturesColumnsEnvironment"
        assert document.count("<table>", 0, document.index("<details")) == 1
        assert page(comparison).count("<details open>") == 4


@pytest.mark.parametrize("write", [page, fragment])
def test_nothing_is_loaded_and_nothing_runs(write, disagreeing):
    document = write(disagreeing)
    read = Reader(document)
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name.endswith(("href", "src", "srcset", "action", "data")):
                assert value.startswith("#"), (tag, name, value)
    assert re.findall(r"url\((?!#)|@import|expression\(", document) == []
    outside = re.sub(r'xmlns(:\w+)?="http://www.w3.org/[\w/]+"', "", document)
    assert "://" not in outside


def test_pictures_have_the_colours_of_the_document(agreeing):
    pictures = "".join(re.findall("<svg.*?</svg>", page(agreeing), re.DOTALL))
    assert pictures.count("currentColor") > 10
    assert not re.search("#000000|#ffffff|<style", pictures)


def test_ids_are_unique_and_what_refers_to_them_finds_them(agreeing, disagreeing):
    document = page(agreeing) + fragment(agreeing) + fragment(disagreeing)
    ids = Counter(re.findall(r'<[^>]* id="([^"]+)"', document))
    assert max(ids.values()) == 1
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', document))
    assert used
    assert used <= set(ids)


def test_a_fragment_is_one_element_that_styles_nothing_else(agreeing):
    document = fragment(agreeing)
    read = Reader(document)
    assert read.elements[0] == ("div", {"class": "torchnnfs"})
    assert not {tag for tag, _ in read.elements} & {"html", "head", "body", "title", "meta"}
    (style,) = re.findall(r"<style.*?>(.*?)</style>", document, re.DOTALL)
    selectors = re.findall(r"^(\S.*?) ?\{", style, re.MULTILINE)
    assert len(selectors) > 15
    assert all(selector.startswith(".torchnnfs.torchnnfs") for selector in selectors)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;"])
@pytest.mark.usefixtures("no_matplotlib")
def test_names_are_escaped(name, agreeing):
    rows = [replace(row, layer=name, state="differs", reason=name) for row in agreeing.rows]
    controls = [replace(control, name=name, reason=name) for control in agreeing.controls]
    facts = {"environment": {name: name}, "notes": (name,), "unjudged": (name,)}
    changed = replace(agreeing, rows=tuple(rows), controls=tuple(controls), **facts)
    document = page(changed)
    assert not {tag for tag, _ in Reader(document).elements} & {"script", "img"}
    assert rows_of(document)[0][1][0] == f"{name} Dense"


def test_an_input_that_is_no_points():
    comparison = compare(classifier(4, 3, 3), torch.randn(7, 4), controls=False)
    assert len(Reader(page(comparison)).all("svg")) == 2


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_pictures_are_left_out(agreeing):
    read = Reader(html.page(agreeing))
    assert read.all("svg") == []
    assert "pip install 'torchnnfs[plot]'" in read.text["p"]
    assert read.text["b"] == "Agrees"


#: Pages in frames, for a browser's own window has a least width, which is more than a phone's.
FRAMES = """\
<!doctype html><body style="margin: 0">{frames}
<script>
addEventListener("load", () => {{
  document.body.dataset.measured = [...document.querySelectorAll("iframe")].map(frame => {{
    const inside = frame.contentDocument;
    const right = what => Math.max(...[...inside.querySelectorAll(what)].map(
      each => each.getBoundingClientRect().right));
    return [frame.contentWindow.innerWidth, inside.documentElement.scrollWidth, right("svg"),
      right("tbody td:nth-child(2)"), inside.querySelector("b").innerText].join("|");
  }}).join(";");
}});
</script>
"""
FRAME = '<iframe width="{width}" height="800" style="border: 0" srcdoc="{document}"></iframe>'


def test_a_browser_shows_the_page_no_wider_than_its_window_and_every_verdict(
    agreeing, disagreeing, browser
):
    rows = [replace(row, layer="a" * 80) for row in disagreeing.rows]
    pages = [page(agreeing), html.page(replace(disagreeing, rows=tuple(rows)))]
    shown = [(width, document) for width in (1280, 390) for document in pages]
    frames = [FRAME.format(width=width, document=escape(document)) for width, document in shown]
    (measured,) = browser(FRAMES.format(frames="".join(frames)))
    for (width, document), frame in zip(shown, measured.split(";"), strict=True):
        inner, whole, pictures, verdicts, words = frame.split("|")
        assert int(inner) == width
        assert int(whole) <= width
        assert 0 < float(pictures) <= width
        assert 0 < float(verdicts) <= width
        assert words == ("Agrees" if document is pages[0] else "Disagrees")
