import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import ReLU, classifier, compare, spiral
from torchnnfs.testing import html
from torchnnfs.testing.report import remarks

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--dump-dom",
]
VOID = {"meta", "br", "img", "link", "input"}


class LeakyReLU(ReLU):
    def forward(self, input):
        return torch.where(input > 0, input, 0.01 * input)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(2, 2)

    def forward(self, input):
        return torch.softmax(input + self.dense(input), -1)


def compared(name="1", *, leaky=False, **keywords):
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    judged = nn.Sequential()
    for path, layer in model.named_children():
        path, layer = (name, LeakyReLU() if leaky else layer) if path == "1" else (path, layer)
        judged.add_module(path, layer)
    return compare(judged, points, reference=model, **keywords)


@pytest.fixture(scope="module")
def agreeing():
    return compared()


@pytest.fixture(scope="module")
def disagreeing():
    return compared(leaky=True)


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


def test_the_verdict_comes_first(agreeing, disagreeing):
    for comparison, words, style in (
        (agreeing, "Agrees with NumPy", "good"),
        (disagreeing, "Disagrees with NumPy", "bad"),
    ):
        document = html.page(comparison)
        read = Reader(document)
        assert read.text["h1"] == words
        assert read.text["title"].startswith(words)
        assert read.all("header") == [{"class": style}]
        assert document.index("<h1>") < document.index("<table") < document.index("<svg")


def test_an_agreement_that_proves_little_says_so(agreeing):
    assert agreeing.controls
    for outcome in ("passed", "indistinguishable"):
        controls = tuple(replace(each, outcome=outcome) for each in agreeing.controls)
        read = Reader(html.page(replace(agreeing, controls=controls)))
        assert read.text["h1"] == "Agrees with NumPy, but this run proves little"
        assert read.all("header") == [{"class": "doubt"}]


def test_every_row_control_remark_and_fact_is_there(agreeing):
    document = unescape(html.page(agreeing))
    for row in agreeing.rows:
        assert f'<th scope="row">{row.layer} {row.kind}</th>' in document
        assert f"{row.candidate} on {row.device} in {row.dtype}</th>" in document
    for control in agreeing.controls:
        cells = f"</th><td>{control.outcome}</td><td>{control.reason}</td>"
        assert control.name + cells in document
    for remark in remarks(agreeing):
        assert f"<li>{remark}</li>" in document
    for name, fact in agreeing.environment.items():
        assert f"<dt>{name}</dt><dd>{fact}</dd>" in document
    assert len(Reader(document).all("figure")) == 3
    assert document.count("Worst element") == 0


def test_a_failing_row_shows_its_worst_element(disagreeing):
    document = html.page(disagreeing)
    wrong = [row for row in disagreeing.rows if not row.ok]
    assert wrong
    assert (
        document.count('<tr class="wrong">') == document.count('<tr class="worst">') == len(wrong)
    )
    for row in wrong:
        worst = row.worst
        shown = f"{list(worst.index)}: {worst.value:.9g} where NumPy gives {worst.expected:.9g}."
        assert f"Worst element {shown}" in document


def test_without_controls_the_page_says_what_that_means():
    assert "No broken twins were tried" in html.page(compared(controls=False))


@pytest.mark.parametrize("kind", [html.page, html.fragment])
def test_nothing_is_loaded_and_nothing_runs(kind, disagreeing):
    document = kind(disagreeing)
    read = Reader(document)
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name.endswith(("href", "src", "srcset", "action", "data")):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert re.findall(r"url\((?!#)|@import|expression\(", document) == []
    outside = re.sub(r'xmlns(:\w+)?="http://www.w3.org/[\w/]+"', "", document)
    assert "://" not in outside


def test_ids_are_unique_and_what_refers_to_them_finds_them(agreeing, disagreeing):
    document = html.page(agreeing) + html.fragment(disagreeing)
    ids = Counter(re.findall(r'<[^>]* id="([^"]+)"', document))
    assert max(ids.values()) == 1
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', document)) <= set(ids)


def test_the_page_is_semantic(agreeing):
    read = Reader(html.page(agreeing))
    assert read.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.all(
        "meta"
    )
    assert len(read.all("h1")) == len(read.all("title")) == len(read.all("main")) == 1
    assert len(read.all("caption")) == len(read.all("table")) == 2
    assert all(cell.get("scope") for cell in read.all("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in read.all("svg"))


def test_a_fragment_is_one_element_that_styles_nothing_else(agreeing):
    document = html.fragment(agreeing)
    read = Reader(document)
    assert read.elements[0] == ("div", {"class": "torchnnfs"})
    assert not {tag for tag, _ in read.elements} & {"html", "head", "body", "title", "meta"}
    (style,) = re.findall(r"<style.*?>(.*?)</style>", document, re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{", style):
        if "@media" not in selectors:
            for selector in selectors.split(","):
                assert selector.strip().startswith(".torchnnfs"), selector


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;"])
def test_names_are_escaped(name):
    comparison = compared(name, leaky=True)
    document = html.page(comparison)
    tags = {tag for tag, _ in Reader(document).elements}
    assert not tags & {"script", "img"}
    assert escape(f"{name} LeakyReLU") in document
    assert escape(comparison.controls[0].reason) in document


def test_environment_and_notes_are_escaped(agreeing):
    changed = replace(agreeing, environment={"<b>": "<i>"}, notes=("<u>",))
    document = html.page(changed)
    assert not {tag for tag, _ in Reader(document).elements} & {"b", "i", "u"}
    assert "<dt>&lt;b&gt;</dt><dd>&lt;i&gt;</dd>" in document


def test_a_model_that_is_no_chain(stream):
    points, _ = spiral(generator=stream)
    document = html.page(compare(Residual(), points))
    assert '<th scope="row">(output) Residual</th>' in document
    assert "(bound: " in document


def test_an_input_that_is_no_points():
    comparison = compare(classifier(4, 3, 3), torch.randn(7, 4), controls=False)
    assert len(Reader(html.page(comparison)).all("figure")) == 2


def test_without_matplotlib_the_pictures_are_left_out(agreeing, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    read = Reader(html.page(agreeing))
    assert read.all("figure") == read.all("svg") == []
    assert "pip install 'torchnnfs[plot]'" in read.text["p"]
    assert read.text["h1"] == "Agrees with NumPy"


def test_the_same_comparison_gives_the_same_page(disagreeing):
    assert html.page(disagreeing) == html.page(disagreeing)


MEASURED = """\
<!doctype html><body style="margin: 0"><iframe width="{width}" height="800" style="border: 0"
onload="const inner = this.contentDocument; document.body.dataset.measured = [
this.contentWindow.innerWidth, inner.documentElement.scrollWidth,
Math.max(...[...inner.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().right)),
inner.querySelector('h1').innerText].join('|')" srcdoc="{document}"></iframe>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium executable on this machine's PATH")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("leaky", [False, True], ids=["agreeing", "disagreeing"])
def test_a_browser_shows_the_page_no_wider_than_its_window(width, leaky, tmp_path):
    comparison = compared("a" * 80 if leaky else "1", leaky=leaky)
    # In a frame: a browser's own window has a least width, which is more than that of a phone.
    framed = MEASURED.format(width=width, document=escape(html.page(comparison)))
    (tmp_path / "framed.html").write_text(framed, encoding="utf-8")
    place = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},800"]
    run = subprocess.run(
        [CHROMIUM, *FLAGS, *place, (tmp_path / "framed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (measured,) = re.findall(r'data-measured="([^"]*)"', run.stdout)
    inner, document, pictures, words = measured.split("|")
    assert int(inner) == width
    assert int(document) <= width
    assert 0 < float(pictures) <= width
    assert words == ("Disagrees with NumPy" if leaky else "Agrees with NumPy")
