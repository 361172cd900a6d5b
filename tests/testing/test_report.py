import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from torchnnfs import ReLU, classifier, compare, spiral
from torchnnfs.testing import Candidate, html, report


def printed(comparison, **options):
    buffer = io.StringIO()
    report.show(comparison, Console(file=buffer, **options))
    return buffer.getvalue()


def test_colour_on_a_terminal_alone(disagreeing, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" not in printed(disagreeing)
    assert re.search(r"\x1b\[1;31mdiffers", printed(disagreeing, force_terminal=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3[12]", printed(disagreeing, force_terminal=True))


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_number_is_cut_off(agreeing, width):
    wide = printed(agreeing, width=500)
    rows = [line.split() for line in wide.splitlines() if line.startswith("│")]
    assert [line.split() for line in printed(agreeing, width=width).splitlines() if "│" in line][
        -len(rows) :
    ] == rows


def test_the_verdict_is_the_last_line(agreeing, disagreeing):
    first = "AGREES: every layer of eager in float32, numpy"
    assert str(agreeing).splitlines()[-1].startswith(first)
    last = str(disagreeing).splitlines()[-1]
    assert last.startswith("DISAGREES: eager on cpu in float32, layer 1 ReLU is the first to")
    assert re.search(r"-\d\S* at \[\d+, \d\] where NumPy gives 0, \S+e\+\d+ times what", last)


def test_markdown(agreeing, disagreeing):
    for comparison in (agreeing, disagreeing):
        text = comparison.to_markdown()
        assert text.startswith(f"**{comparison.verdict}**\n\n| candidate | device |")
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(comparison.rows)
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
        assert "torch " in text.splitlines()[-1]
    # The comparison is left as it was: its table still has its own frame.
    assert "┃ max |error| ┃" in str(agreeing)


def test_what_cannot_be_told_apart_is_named(stream):
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    text = str(compare(model, points, candidates=[Candidate(dtype=torch.bfloat16)]))
    assert re.search(r"Controls: \d+ of \d+ deliberately broken copies", text)
    assert "Indistinguishable here: " in text


def test_numpys_exp_is_named_where_it_is_not_exact():
    logits = torch.randn(1000, 3)
    comparison = compare(nn.Softmax(-1), logits, candidates=["numpy"])
    shifted = (logits - logits.amax(1, keepdim=True)).numpy()
    exact = np.exp(shifted.astype(np.float64)).astype(np.float32)
    wrong = np.count_nonzero(np.exp(shifted) != exact)
    named = [note for note in comparison.notes if "not correctly rounded" in note]
    assert len(named) == (wrong > 30)  # the C library's exp is so for very few
    assert not named or f"for {wrong} of 3000 numbers" in named[0]


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "\r", "\u202e"])
def test_no_name_commands_a_terminal_or_breaks_a_line(name, agreeing):
    rows = [replace(row, candidate=name, device=name, layer=name) for row in agreeing.rows]
    rows[1] = replace(rows[1], state="differs", reason=name)
    changed = {"notes": (name,), "unjudged": (name,), "environment": {name: name}}
    comparison = replace(agreeing, rows=tuple(rows), **changed)
    for text in (str(comparison), comparison.to_markdown(), html.page(comparison)):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert ascii(name)[1:-1] in text.replace("\\\\", "\\")
    assert "\n" not in comparison.verdict


def test_markdown_shows_a_name_as_it_is(agreeing):
    name = "<img src=x> | [a](b) `c` *d* _e_"
    rows = tuple(replace(row, layer=name) for row in agreeing.rows)
    text = replace(agreeing, rows=rows, notes=(name,)).to_markdown()
    shown = r"\<img src=x> \| [a\](b) \`c\` \*d\* \_e\_"
    assert f"\n- {shown}\n" in text
    assert text.count(f"| {shown} Dense |") == 4


def test_units_of_float64_are_left_out_where_they_mean_nothing(agreeing):
    row = replace(agreeing.rows[0], candidate="the model", dtype="float64", max_ulp=2e9)
    shown = dict(zip(report.HEADINGS, report.cells(row), strict=True))
    assert (shown["max ULP"], shown["bits equal"]) == ("", "")
    assert shown["max |error|"] != ""


def test_the_verdict_says_what_was_not_called_or_judged(agreeing):
    uncalled = replace(agreeing, notes=("Never called, so not judged: a.",))
    assert uncalled.verdict.startswith("AGREES: every layer that was called of eager in float32")
    partly = replace(agreeing, unjudged=("2 Net",))
    controls = [line for line in report.remarks(partly) if line.startswith("Controls")]
    assert controls[0].endswith("They break layers with a formula, not 2 Net.")
    assert "of its bound" in agreeing.verdict


def test_names_are_printed_as_they_are():
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("[red]", ReLU())
    model[0].add_module("a|b", ReLU())
    comparison = compare(model, torch.randn(3, 2), candidates=["eager"])
    assert "0.[red] ReLU" in str(comparison)
    assert r"| 0.[red] ReLU |" in comparison.to_markdown()
    assert r"| 0.a\|b ReLU |" in comparison.to_markdown()
